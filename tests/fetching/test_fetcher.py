"""Downloads are complete and verified, and fetched once, whatever the server and network do."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.web import Fault, Web, serve
from transcriptformer.errors import DownloadError
from transcriptformer.fetching import fetcher, http
from transcriptformer.fetching.fetcher import (
    DamagedFileError,
    Fetcher,
    RefusedFileError,
    TransientDownloadError,
    checksum,
)
from transcriptformer.fetching.http import HttpFile, http_get
from transcriptformer.storage.sealed import read_json, sealed_json

CONTENT = np.random.default_rng(0).bytes(300_000)
FILE = "/file"


@pytest.fixture(autouse=True)
def wait_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "INITIAL_BACKOFF", 0.001)


@pytest.fixture
def web() -> Iterator[Web]:
    with serve(Web({FILE: CONTENT})) as web:
        yield web


@pytest.fixture
def remote(web: Web) -> Iterator[HttpFile]:
    with closing(HttpFile(web.address + FILE)) as remote:
        yield remote


def fetch_file(web: Web, target: Path, retries: int = 3, size: int | None = None, connections: int = 1) -> bytes:
    """Download a file and check that `verify` saw what is at the target."""
    with closing(HttpFile(web.address + FILE, size)) as remote:
        seen = Fetcher(retries, connections).fetch(remote, target, Path.read_bytes)
    assert seen == target.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    return seen


def once(fault: str) -> Fault:
    """A fault of only the first request."""
    return lambda path, n: "" if n else fault


def test_file_is_downloaded(web: Web, tmp_path: Path) -> None:
    assert fetch_file(web, tmp_path / "new" / "file") == CONTENT
    assert len(web.requests) == 1


@pytest.mark.parametrize("fault", ["reset", "truncated", "short", "long", "slow", "500", "507", "520", "429", "408"])
def test_failed_requests_are_resumed(fault: str, web: Web, tmp_path: Path) -> None:
    web.fault = once(fault)
    assert fetch_file(web, tmp_path / "file") == CONTENT
    assert web.sent[FILE] <= len(CONTENT)


def test_stalled_request_is_retried(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TIMEOUT", (5, 0.5))
    web.fault = once("slow 60")  # three seconds between chunks
    assert fetch_file(web, tmp_path / "file") == CONTENT
    assert web.ranges(FILE)[1] == "bytes=15000-299999"


def test_progress_resets_the_retry_count(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: "reset" if n < 12 else ""
    assert fetch_file(web, tmp_path / "file", retries=0) == CONTENT
    assert web.sent[FILE] <= len(CONTENT)


def test_interrupted_download_is_resumed(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: {0: "reset", 1: "500"}.get(n, "")
    with pytest.raises(TransientDownloadError, match="500"):
        fetch_file(web, tmp_path / "file", retries=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.part", "file.part.json"]
    assert fetch_file(web, tmp_path / "file") == CONTENT
    assert web.ranges(FILE) == ["bytes=0-", "bytes=150000-"]


@pytest.mark.parametrize(
    "journal",
    [
        *("", "{}", "[]", '{"version": 1}'),
        *map(sealed_json, (None, {"version": 1}, {"version": "x", "size": 300_000, "ranges": 3})),
        sealed_json({"version": "x", "size": 300_000, "ranges": [[0, 300_000]]}),
    ],
)
def test_invalid_journal_restarts_the_download(journal: str, web: Web, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 400_000)
    (tmp_path / "file.part.json").write_text(journal)
    assert fetch_file(web, tmp_path / "file") == CONTENT


@pytest.mark.parametrize("kept", ["file.part", "file.part.json"])
def test_every_flipped_bit_of_a_partial_download_is_detected(kept: str, web: Web, tmp_path: Path) -> None:
    """Without a checksum from the server."""
    web.fault = lambda path, n: {0: "reset", 1: "500"}.get(n, "")
    with pytest.raises(TransientDownloadError):
        fetch_file(web, tmp_path / "file", retries=0)
    left = {path: path.read_bytes() for path in tmp_path.iterdir()}
    web.fault = lambda path, n: ""
    content = left[tmp_path / kept]
    for place in range(0, len(content), 1 + len(content) // 40):
        for path, whole in left.items():
            path.write_bytes(whole)
        (tmp_path / kept).write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        (tmp_path / "file").unlink(missing_ok=True)
        assert fetch_file(web, tmp_path / "file") == CONTENT


def test_missing_journal_restarts_the_download(web: Web, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 400_000)
    assert fetch_file(web, tmp_path / "file") == CONTENT


@pytest.mark.parametrize("new", [CONTENT[::-1], CONTENT[:1000], CONTENT * 2])
def test_file_that_changes_meanwhile_is_downloaded_again(new: bytes, web: Web, tmp_path: Path) -> None:
    def change(path: str, n: int) -> str:
        if n == 1:
            web.files[FILE] = new
        return "" if n else "reset"

    web.fault = change
    assert fetch_file(web, tmp_path / "file") == new


def test_file_that_changed_between_runs_is_downloaded_again(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: {0: "reset", 1: "500"}.get(n, "")
    with pytest.raises(TransientDownloadError):
        fetch_file(web, tmp_path / "file", retries=0)
    web.files[FILE] = CONTENT[::-1]
    assert fetch_file(web, tmp_path / "file") == CONTENT[::-1]


@pytest.mark.parametrize("fault", ["", "reset", "truncated", "500"])
def test_server_without_range_requests_works(fault: str, web: Web, tmp_path: Path) -> None:
    web.serves_ranges, web.fault = False, once(fault)
    assert fetch_file(web, tmp_path / "file", connections=8) == CONTENT


def test_large_file_uses_several_connections(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetcher, "MIN_RANGE_BYTES", 50_000)
    web.fault = lambda path, n: "reset" if n in (1, 2) else ""
    assert fetch_file(web, tmp_path / "file", connections=4) == CONTENT
    starts = {int(wanted.removeprefix("bytes=").split("-")[0]) for wanted in web.ranges(FILE)}
    assert starts >= {0, 75_000, 150_000, 225_000}


def test_empty_file_is_downloaded(web: Web, tmp_path: Path) -> None:
    web.files[FILE] = b""
    assert fetch_file(web, tmp_path / "file") == b""


def test_progress_counts_bytes_on_disk(web: Web, remote: HttpFile, tmp_path: Path) -> None:
    counts: list[int] = []
    web.serves_ranges, web.fault = False, once("reset")
    Fetcher(advance=counts.append).fetch(remote, tmp_path / "file", Path.read_bytes)
    assert sum(counts) == len(CONTENT)
    assert min(counts) < 0  # without range requests, partial data is discarded


def test_wrong_size_is_refused(web: Web, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="300000 bytes on the server, expected 300001"):
        fetch_file(web, tmp_path / "file", size=300_001)
    assert list(tmp_path.iterdir()) == []


def test_damaged_file_is_downloaded_again_and_then_refused(web: Web, remote: HttpFile, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise DamagedFileError("rotten")

    with pytest.raises(DamagedFileError, match="rotten"):
        Fetcher().fetch(remote, tmp_path / "file", refuse)
    assert len(web.ranges(FILE)) == fetcher.MAX_DOWNLOADS
    assert list(tmp_path.iterdir()) == []


def test_refused_file_is_not_downloaded_again(web: Web, remote: HttpFile, tmp_path: Path) -> None:
    def refuse(path: Path) -> None:
        raise RefusedFileError("hostile")

    with pytest.raises(RefusedFileError, match="hostile"):
        Fetcher().fetch(remote, tmp_path / "file", refuse)
    assert len(web.ranges(FILE)) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [("crc32", "y/Q5Jg=="), ("md5", "JfnnlDI7RTiF9RgfG2JNCw=="), ("sha1", "98O8HYCOBHMq32eZZczDTKeuNEE=")],
)
def test_checksums_match_s3(algorithm: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "digits").write_bytes(b"123456789")
    assert checksum(tmp_path / "digits", algorithm) == value


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_permanent_errors_are_not_retried(status: int, web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: str(status)
    with pytest.raises(DownloadError, match=f"{FILE}: HTTP {status}"):
        fetch_file(web, tmp_path / "file")
    assert len(web.requests) == 1


def test_retries_are_limited(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: "503"
    with pytest.raises(DownloadError, match="503"):
        fetch_file(web, tmp_path / "file", retries=4)
    assert len(web.requests) == 5


def test_retry_after_is_respected(web: Web) -> None:
    for value, least, most in [
        ("7", 7, 7),
        ("99999", 600, 600),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 600, 600),
        ("x", 0, 0),
        ("²", 0, 0),
    ]:
        web.fault = lambda path, n, value=value: f"429 {value}"  # type: ignore[misc]
        with pytest.raises(TransientDownloadError) as told:
            http_get(web.address + FILE, {})
        assert least <= told.value.wait <= most


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/file", "the connection was refused"),
        ("http://no-such-host.invalid/file", "host not found, or no network"),
        ("htp://127.0.0.1/file", "not a valid URL"),
        ("nonsense", "not a valid URL"),
    ],
)
def test_unreachable_server_is_a_one_line_error(url: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=reason):
        Fetcher(retries=0).fetch(HttpFile(url), tmp_path / "file", Path.read_bytes)


def test_reason_of_a_failure_is_not_read_from_the_url(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="the connection was refused"):
        Fetcher(retries=0).fetch(
            HttpFile("http://127.0.0.1:9/timed out/unreachable"), tmp_path / "file", Path.read_bytes
        )


def test_lack_of_disk_space_is_reported_before_downloading(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "RESERVED_BYTES", 2**60)
    with pytest.raises(DownloadError, match=r"needs .*, .* free; free up space"):
        fetch_file(web, tmp_path / "file")
    assert len(web.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_an_error(web: Web, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(DownloadError, match="cannot be written"):
        fetch_file(web, tmp_path / "taken" / "file")


def test_journal_beyond_the_data_restarts_the_download(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: {0: "reset", 1: "500"}.get(n, "")
    with pytest.raises(TransientDownloadError):
        fetch_file(web, tmp_path / "file", retries=0)
    (tmp_path / "file.part").write_bytes(b"short")
    assert fetch_file(web, tmp_path / "file") == CONTENT


def test_data_of_another_version_is_discarded(web: Web, tmp_path: Path) -> None:
    """Even if the first version comes back."""
    web.fault = lambda path, n: {0: "reset", 1: "500", 2: "reset", 3: "500"}.get(n, "")
    for content in (CONTENT, CONTENT[::-1]):
        web.files[FILE] = content
        with pytest.raises(TransientDownloadError):
            fetch_file(web, tmp_path / "file", retries=0)
    web.files[FILE] = CONTENT
    assert fetch_file(web, tmp_path / "file") == CONTENT


def test_resumed_bytes_are_counted_separately(web: Web, tmp_path: Path) -> None:
    web.fault = lambda path, n: {0: "reset", 1: "500"}.get(n, "")
    with pytest.raises(TransientDownloadError):
        fetch_file(web, tmp_path / "file", retries=0)
    found: list[int] = []
    fetched: list[int] = []
    with closing(HttpFile(web.address + FILE)) as remote:
        Fetcher(advance=fetched.append, resumed=found.append).fetch(remote, tmp_path / "file", Path.read_bytes)
    assert (sum(found), sum(fetched)) == (150_000, 150_000)


def test_stopped_fetcher_downloads_nothing(remote: HttpFile, tmp_path: Path) -> None:
    fetcher = Fetcher()
    fetcher.stopping.set()
    with pytest.raises(DownloadError, match="stopped"):
        fetcher.fetch(remote, tmp_path / "file", Path.read_bytes)
    assert not (tmp_path / "file").exists()


def test_stopped_download_can_be_resumed(web: Web, remote: HttpFile, tmp_path: Path) -> None:
    stopping = threading.Event()
    web.fault = once("slow")
    fetcher = Fetcher(advance=lambda n: stopping.set() if n else None, stopping=stopping)
    with pytest.raises(DownloadError, match="stopped"):
        fetcher.fetch(remote, tmp_path / "file", Path.read_bytes)
    reached = read_json(tmp_path / "file.part.json")["ranges"][0][2]
    assert 0 < reached < len(CONTENT)
    assert (tmp_path / "file.part").read_bytes()[:reached] == CONTENT[:reached]
    assert fetch_file(web, tmp_path / "file") == CONTENT


def test_journal_never_runs_ahead_of_the_data(
    web: Web, remote: HttpFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal is saved after the bytes, also during the download."""
    monkeypatch.setattr(fetcher, "FLUSH_BYTES", 1)
    seen = []

    def look(n_bytes: int) -> None:
        if n_bytes:
            seen.append(read_json(tmp_path / "file.part.json")["ranges"][0][2])
            assert (tmp_path / "file.part").stat().st_size >= seen[-1]

    web.fault = once("slow")
    Fetcher(advance=look).fetch(remote, tmp_path / "file", Path.read_bytes)
    assert seen == sorted(seen)
    assert len(seen) >= 5


def test_exclusive_lock_waits_for_the_other_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "transcriptformer")
    order = []

    def second() -> None:
        with fetcher.exclusive_lock(tmp_path / "lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    with fetcher.exclusive_lock(tmp_path / "lock"):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert re.search(r"in use by another run \(process \d+ on .*\); waiting", caplog.text)
