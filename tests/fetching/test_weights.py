"""Weights are downloaded from S3 completely, safely and once."""

import itertools
import json
import os
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
from botocore.config import Config
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner, Result

from tests.archives import HOSTILE, member, pack, pack_members
from tests.commands import COMMAND, finish, start
from tests.fetching.test_archive import contents
from tests.golden_cases import CHECKPOINT
from transcriptformer.cli.main import app
from transcriptformer.fetching import fetcher, weights
from transcriptformer.fetching.weights import ARTIFACTS
from transcriptformer.storage.sealed import write_json

BUCKET = "a-mirror"
KEY = "weights/tf_sapiens.tar.gz"


class Mirror:
    """A bucket with archives, and its endpoint."""

    def __init__(self, address: str) -> None:
        self.address = address
        login = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        config = Config(request_checksum_calculation="when_required")  # else boto3 adds a CRC to every object
        self.client = boto3.client("s3", endpoint_url=address, config=config, **login)

    def put(self, path: Path, key: str = KEY, **options: str) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes(), ACL="public-read", **options)


@pytest.fixture(scope="module")
def server() -> Iterator[Mirror]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    mirror = Mirror("http://{}:{}".format(*moto.get_host_and_port()))
    mirror.client.create_bucket(Bucket=BUCKET)
    yield mirror
    mirror.client.close()
    moto.stop()


@pytest.fixture
def mirror(server: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mirror:
    """Mirror with the synthetic checkpoint as TF-Sapiens, set as the command's endpoint."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
    monkeypatch.setattr(fetcher, "INITIAL_BACKOFF", 0.001)
    for found in server.client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        server.client.delete_object(Bucket=BUCKET, Key=found["Key"])
    server.put(pack(CHECKPOINT, tmp_path / "sapiens.tar.gz", "tf_sapiens"))
    return server


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def download(place: Path, *options: object, models: tuple[str, ...] = ("tf-sapiens",)) -> Result:
    fixed = ["download", *models, "--checkpoint-dir", place, "--bucket", BUCKET, "--max-retries", 1]
    return CliRunner().invoke(app, [str(part) for part in (*fixed, *options)])


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def assert_whole(place: Path, model: str = "tf_sapiens") -> None:
    found = contents(place / model)
    found.pop("download.json")
    assert found == contents(CHECKPOINT)
    assert visible(place) == [model]


def test_checkpoint_is_downloaded_and_described(mirror: Mirror, place: Path) -> None:
    result = download(place)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{place}/tf_sapiens: 2 layers of width 32, 305 genes of homo sapiens\n"
    assert_whole(place)
    record = json.loads((place / "tf_sapiens" / "download.json").read_text())
    assert record["source"] == f"s3://{BUCKET}/{KEY}"
    assert record["files"].keys() == contents(CHECKPOINT).keys()


def test_complete_checkpoint_needs_no_network(mirror: Mirror, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download(place)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    result = download(place)
    assert result.exit_code == 0
    assert "already complete" in result.stderr
    assert "2 layers" in result.stdout


def test_checkpoint_copied_by_hand_is_complete(mirror: Mirror, place: Path) -> None:
    shutil.copytree(CHECKPOINT, place / "tf_sapiens")
    result = download(place)
    assert result.exit_code == 0
    assert "already complete" in result.stderr
    assert contents(place / "tf_sapiens") == contents(CHECKPOINT)


@pytest.mark.parametrize("damage", ["missing", "cut", "record"])
def test_damaged_checkpoint_is_named_and_replaced_on_request(damage: str, mirror: Mirror, place: Path) -> None:
    download(place)
    weights = place / "tf_sapiens" / "model_weights.pt"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        os.truncate(weights, 1000)
    else:
        (place / "tf_sapiens" / "download.json").write_text("{")
    result = download(place)
    assert result.exit_code == 1
    assert "is missing or damaged; add --force to replace the folder" in result.stderr
    assert download(place, "--force").exit_code == 0
    assert_whole(place)


def test_all_downloads_every_artifact(mirror: Mirror, place: Path, tmp_path: Path) -> None:
    for name in ("tf_exemplar", "tf_metazoa"):
        mirror.put(pack(CHECKPOINT, tmp_path / "archive.tar.gz", name), f"weights/{name}.tar.gz")
    embeddings = pack(CHECKPOINT / "vocabs", tmp_path / "archive.tar.gz", "all_embeddings")
    mirror.put(embeddings, "weights/all_embeddings.tar.gz")
    result = download(place, models=("all",))
    assert result.exit_code == 0, result.output
    assert visible(place) == sorted(ARTIFACTS.values())
    assert "protein embeddings of 1 species: homo sapiens (305 genes)" in result.stdout


@pytest.mark.parametrize("algorithm", ["SHA256", "SHA1", "CRC32", "MD5"])
def test_checksum_mismatch_restarts_the_download(algorithm: str, mirror: Mirror, place: Path, tmp_path: Path) -> None:
    """The journal of an earlier run claims completion, but the bytes differ."""
    mirror.put(tmp_path / "sapiens.tar.gz", **({} if algorithm == "MD5" else {"ChecksumAlgorithm": algorithm}))
    size = (tmp_path / "sapiens.tar.gz").stat().st_size
    tag = mirror.client.head_object(Bucket=BUCKET, Key=KEY)["ETag"]
    place.mkdir()
    (place / ".tf_sapiens.tar.gz.part").write_bytes(bytes(size))
    journal = {"version": tag, "size": size, "ranges": [[0, size, size, zlib.crc32(bytes(size))]]}
    write_json(place / ".tf_sapiens.tar.gz.part.json", journal)
    result = download(place)
    assert result.exit_code == 0
    assert f"{algorithm} checksum mismatch; restarting the download" in result.stderr
    assert_whole(place)


def test_changed_object_restarts_the_download(mirror: Mirror, place: Path, tmp_path: Path) -> None:
    size = (tmp_path / "sapiens.tar.gz").stat().st_size
    place.mkdir()
    (place / ".tf_sapiens.tar.gz.part").write_bytes(bytes(size))
    journal = {"version": '"another"', "size": size, "ranges": [[0, size, size, zlib.crc32(bytes(size))]]}
    write_json(place / ".tf_sapiens.tar.gz.part.json", journal)
    assert download(place).exit_code == 0
    assert_whole(place)


def test_large_object_uses_several_connections(
    mirror: Mirror, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "MIN_RANGE_BYTES", 50_000)
    assert download(place, "--connections", 5).exit_code == 0
    assert_whole(place)


@pytest.mark.parametrize("kind", HOSTILE)
def test_malicious_archive_keeps_the_existing_checkpoint(
    kind: str, mirror: Mirror, place: Path, tmp_path: Path
) -> None:
    download(place)
    members = [member("tf_sapiens/config.json"), *HOSTILE[kind]("tf_sapiens")]
    mirror.put(pack_members(tmp_path / "hostile.tar.gz", members))
    before = contents(tmp_path)
    result = download(place, "--force")
    assert result.exit_code == 1
    assert "the archive was not unpacked" in result.stderr
    assert contents(tmp_path) == before
    assert_whole(place)


def test_incomplete_archive_keeps_the_existing_checkpoint(mirror: Mirror, place: Path, tmp_path: Path) -> None:
    download(place)
    mirror.put(pack_members(tmp_path / "half.tar.gz", [member("tf_sapiens/config.json")]))
    result = download(place, "--force")
    assert result.exit_code == 1
    assert "model_weights.pt, vocabs missing in the archive; it was not installed" in result.stderr
    assert_whole(place)


def test_mirror_may_pack_a_downloaded_folder(mirror: Mirror, place: Path, tmp_path: Path) -> None:
    download(place)
    mirror.put(pack(place / "tf_sapiens", tmp_path / "again.tar.gz", "tf_sapiens"))
    for _ in range(2):
        assert download(tmp_path / "elsewhere").exit_code == 0
    assert_whole(tmp_path / "elsewhere")


def test_symbolic_link_can_be_replaced_repeatedly(mirror: Mirror, place: Path, tmp_path: Path) -> None:
    place.mkdir()
    (tmp_path / "large").mkdir()
    (place / "tf_sapiens").symlink_to(tmp_path / "large")
    for _ in range(3):
        assert download(place, "--force").exit_code == 0
    assert_whole(place)


def test_other_archives_are_kept(mirror: Mirror, place: Path) -> None:
    place.mkdir()
    (place / "tf_sapiens.tar.gz").write_text("mine")
    assert download(place).exit_code == 0
    assert (place / "tf_sapiens.tar.gz").read_text() == "mine"


def test_truncated_archive_keeps_the_existing_checkpoint(mirror: Mirror, place: Path, tmp_path: Path) -> None:
    download(place)
    os.truncate(tmp_path / "sapiens.tar.gz", 10_000)
    mirror.put(tmp_path / "sapiens.tar.gz")
    result = download(place, "--force")
    assert result.exit_code == 1
    assert "truncated or damaged" in result.stderr
    assert_whole(place)


def test_disk_space_for_archive_and_contents_is_checked_first(
    mirror: Mirror, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "UNPACKED_RATIO", 1e12)
    result = download(place)
    assert result.exit_code == 1
    assert "free up space and rerun" in result.stderr
    assert visible(place) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--bucket", "no-such-bucket"], "s3://no-such-bucket/weights/tf_sapiens.tar.gz: HTTP 404"),
        (["--bucket", "Not a bucket!"], "Invalid bucket name"),
    ],
)
def test_missing_bucket_is_a_one_line_error(options: list[str], reason: str, mirror: Mirror, place: Path) -> None:
    result = download(place, *options)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert visible(place) == []


def test_missing_network_is_a_one_line_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    result = download(place, "--max-retries", 0)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"ERROR: s3://{BUCKET}/{KEY}: Could not connect")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_missing_network_is_retried(endpoint: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    monkeypatch.setattr(fetcher, "INITIAL_BACKOFF", 0.01)
    result = download(place, "--max-retries", 2)
    assert result.exit_code == 1
    assert result.stderr.count("; retrying") == 2


def test_unknown_model_is_a_one_line_error(place: Path) -> None:
    result = download(place, models=("tf-sapient",))
    assert result.exit_code == 2
    assert "'tf-sapient' is unknown; choose from tf-sapiens, tf-exemplar" in result.stderr


def test_unwritable_folder_is_a_one_line_error(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    result = download(tmp_path / "taken")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1


def command(place: Path) -> list[str]:
    return [str(part) for part in (COMMAND, "download", "tf-sapiens", "--checkpoint-dir", place, "--bucket", BUCKET)]


def test_concurrent_runs_are_safe(mirror: Mirror, place: Path) -> None:
    runs = [start(command(place)) for _ in range(2)]
    results = [finish(run) for run in runs]
    assert [result.returncode for result in results] == [0, 0]
    assert sum("already complete" in result.stderr for result in results) == 1
    assert_whole(place)


@pytest.mark.parametrize("left", ["old", "old and new", "new", "archive"])
def test_leftovers_of_a_killed_run_are_cleaned_up(left: str, mirror: Mirror, place: Path) -> None:
    download(place)
    folder = place / "tf_sapiens"
    if left == "old":  # killed between the two moves
        folder.rename(place / ".tf_sapiens.old")
    elif left == "old and new":
        shutil.copytree(folder, place / ".tf_sapiens.old")
    elif left == "new":
        shutil.copytree(folder, place / ".tf_sapiens.tmp")
    else:
        (place / ".tf_sapiens.tar.gz").write_text("left")
        (place / ".tf_sapiens.tar.gz.part.json").write_text("left")
    result = download(place)
    assert "already complete" in result.stderr
    assert_whole(place)


@pytest.mark.slow
def test_rerun_after_a_kill_completes_the_download(mirror: Mirror, place: Path, tmp_path: Path) -> None:
    """With incompressible data, to be slow enough to kill; the final folder is always complete."""
    large = Path(shutil.copytree(CHECKPOINT, tmp_path / "large"))
    (large / "noise").write_bytes(np.random.default_rng(0).bytes(150_000_000))
    mirror.put(pack(large, tmp_path / "large.tar.gz", "tf_sapiens"))
    rng = np.random.default_rng(0)
    for moment in itertools.chain(rng.uniform(0.3, 6, 20), [None]):
        process = start(command(place))
        if moment is not None:
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
        result = finish(process)
        if (place / "tf_sapiens").exists():
            assert contents(place / "tf_sapiens").keys() >= contents(large).keys()
            if moment is not None:
                shutil.rmtree(place / "tf_sapiens")  # and once more
    assert result.returncode == 0, result.stderr
    found = contents(place / "tf_sapiens")
    found.pop("download.json")
    assert found == contents(large)
    assert visible(place) == ["tf_sapiens"]
