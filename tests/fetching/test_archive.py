"""Archives are unpacked to folders; malicious and damaged ones leave nothing behind."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from tests.archives import HOSTILE, member, pack, pack_members
from tests.golden_cases import CHECKPOINT
from transcriptformer.errors import DownloadError
from transcriptformer.fetching.archive import unpack
from transcriptformer.fetching.fetcher import DamagedFileError, RefusedFileError

NAME = "tf_sapiens"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "archives" / "archive.tar.gz"


@pytest.fixture
def into(tmp_path: Path, archive: Path) -> Path:
    archive.parent.mkdir()
    return tmp_path / "place" / "unpacked"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_round_trips(archive: Path, into: Path) -> None:
    unpack(pack(CHECKPOINT, archive, NAME), NAME, into)
    assert contents(into) == contents(CHECKPOINT)


@pytest.mark.parametrize("first", [".", "./._tf_sapiens", "tf_sapiens/._config.json"])
def test_archiver_metadata_is_skipped(first: str, archive: Path, into: Path) -> None:
    kind = tarfile.DIRTYPE if first == "." else tarfile.REGTYPE
    unpack(pack_members(archive, [member(first, kind), member(f"./{NAME}/config.json")]), NAME, into)
    assert contents(into) == {"config.json": b"content"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_malicious_archive_is_refused(kind: str, archive: Path, into: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("untouched")
    pack_members(archive, [member(f"{NAME}/config.json"), *HOSTILE[kind](NAME)])
    before = contents(tmp_path)
    with pytest.raises(RefusedFileError, match=r"is outside the expected folder|is a link or a device"):
        unpack(archive, NAME, into)
    assert contents(tmp_path) == before
    assert not into.exists()
    assert not Path("/tmp/outside-of-the-folder").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_archive_leaves_nothing(share: float, archive: Path, into: Path) -> None:
    whole = pack(CHECKPOINT, archive, NAME).read_bytes()
    archive.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DamagedFileError, match="truncated or damaged"):
        unpack(archive, NAME, into)
    assert not into.exists()


@pytest.mark.parametrize("place", [0.3, 0.9])
def test_damaged_archive_leaves_nothing(place: float, archive: Path, into: Path) -> None:
    damaged = bytearray(pack(CHECKPOINT, archive, NAME).read_bytes())
    damaged[int(place * len(damaged))] ^= 0xFF
    archive.write_bytes(damaged)
    with pytest.raises(DamagedFileError, match="truncated or damaged"):
        unpack(archive, NAME, into)
    assert not into.exists()


def test_damage_after_the_last_file_fails_the_checksum(archive: Path, into: Path) -> None:
    damaged = bytearray(pack(CHECKPOINT, archive, NAME).read_bytes())
    damaged[-6] ^= 0xFF
    archive.write_bytes(damaged)
    with pytest.raises(DamagedFileError, match="CRC"):
        unpack(archive, NAME, into)
    assert not into.exists()


@pytest.mark.parametrize("content", [b"", b"no archive", gzip.compress(b"no archive" * 100, mtime=0)])
def test_non_archive_leaves_nothing(content: bytes, archive: Path, into: Path) -> None:
    archive.write_bytes(content)
    with pytest.raises(DamagedFileError, match="truncated or damaged"):
        unpack(archive, NAME, into)
    assert not into.exists()


@pytest.mark.parametrize("damage", ["ends at a member", "ends within a header", "a header is damaged"])
def test_damaged_tar_in_an_intact_gzip_leaves_nothing(damage: str, archive: Path, into: Path) -> None:
    pack_members(archive, [member(f"{NAME}/config.json"), member(f"{NAME}/other")])
    tar = bytearray(gzip.decompress(archive.read_bytes()))
    if damage == "a header is damaged":
        tar[1024 + 150] ^= 0xFF  # inside the header checksum
    else:
        del tar[1024 if damage == "ends at a member" else 1100 :]
    archive.write_bytes(gzip.compress(tar))
    with pytest.raises(DamagedFileError, match="truncated or damaged"):
        unpack(archive, NAME, into)
    assert not into.exists()


def test_huge_header_is_refused(archive: Path, into: Path) -> None:
    long = tarfile.TarInfo(f"{NAME}/config.json")
    long.pax_headers = {"comment": "x" * 2**21}
    with tarfile.open(archive, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(long)
    with pytest.raises(RefusedFileError, match=r"header of \d+ bytes, more than"):
        unpack(archive, NAME, into)
    assert not into.exists()


def test_endless_trailing_data_is_refused(archive: Path, into: Path) -> None:
    pack_members(archive, [member(f"{NAME}/config.json")])
    archive.write_bytes(archive.read_bytes() + gzip.compress(bytes(2**26 + 2**21)))
    with pytest.raises(RefusedFileError, match="trailing data after the last member"):
        unpack(archive, NAME, into)
    assert not into.exists()


def test_archive_larger_than_the_disk_is_refused(archive: Path, into: Path) -> None:
    """Its header declares a petabyte; nothing is written."""
    bomb = tarfile.TarInfo(f"{NAME}/model_weights.pt")
    bomb.size = 2**50
    with gzip.open(archive, "wb") as file:
        file.write(bomb.tobuf())
        file.write(bytes(2**20))
    with pytest.raises(DownloadError, match=r"needs .*, .* free; free up space"):
        unpack(archive, NAME, into)
    assert not into.exists()


def test_file_in_place_of_a_folder_is_an_error(archive: Path, into: Path) -> None:
    into.parent.write_text("taken")
    with pytest.raises(DownloadError, match="cannot be written"):
        unpack(pack(CHECKPOINT, archive, NAME), NAME, into)


def test_last_of_duplicate_members_is_kept(archive: Path, into: Path) -> None:
    """As with tar, the last of duplicate members wins."""
    with tarfile.open(archive, "w:gz") as tar:
        for content in (b"first", b"second"):
            info = member(f"{NAME}/config.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    unpack(archive, NAME, into)
    assert contents(into) == {"config.json": b"second"}
