"""Published weights and protein embeddings, from a public S3 bucket to a folder each."""

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from transcriptformer.errors import DownloadError, UsageError
from transcriptformer.fetching.archive import unpack
from transcriptformer.fetching.fetcher import (
    Fetcher,
    RefusedFileError,
    Stat,
    alone,
    clear_part,
    gigabytes,
    need_space,
    part_of,
    size_on_disk,
    write_json,
    writing_to,
)
from transcriptformer.fetching.s3 import S3Object
from transcriptformer.storage.atomic import atomic_folder, older_path, remove, temporary_path, tidy_folder

logger = logging.getLogger(__name__)

BUCKET = "czi-transcriptformer"

ARTIFACTS = {
    "tf-sapiens": "tf_sapiens",
    "tf-exemplar": "tf_exemplar",
    "tf-metazoa": "tf_metazoa",
    "all-embeddings": "all_embeddings",
}
"""What can be downloaded, and its folder."""

RECORD = "download.json"
"""File in each folder that tells where it came from and what belongs to it."""

CHECKPOINT_FILES = ("config.json", "model_weights.pt", "vocabs")
"""What every checkpoint has."""

UNPACKED_SIZE = 1.2
"""Of an archive's size, what its contents are taken to need before they are known; weights hardly shrink."""


def artifacts_of(names: list[str]) -> list[str]:
    """What the names mean, each once; `all` is everything.

    Raises
    ------
    UsageError
        If a name is unknown.
    """
    unknown = [name for name in names if name not in ARTIFACTS and name != "all"]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not known; there are: {', '.join(ARTIFACTS)}, all")
    return [name for name in ARTIFACTS if name in names or "all" in names]


def download(
    name: str,
    checkpoint_dir: Path,
    fetcher: Fetcher,
    bucket: str = BUCKET,
    force: bool = False,
    started: Callable[[int], object] = lambda n_bytes: None,
) -> Path:
    """Bring one artifact to its folder below `checkpoint_dir`, which is replaced only by a whole one.

    Parameters
    ----------
    fetcher
        How.
    bucket
        Where it is; a mirror has the same keys.
    force
        Fetch it even where it is complete.
    started
        Called with the archive's size when it begins to come.

    Returns
    -------
    The folder.

    Raises
    ------
    DownloadError
        If it cannot be had. What came of it stays for the next try.
    """
    folder = checkpoint_dir / ARTIFACTS[name]
    archive = _beside(folder, "tar.gz")
    left_by_a_killed_run = (archive, part_of(archive), older_path(folder), temporary_path(folder))
    if not force and not any(path.exists() for path in left_by_a_killed_run) and _is_there(folder):
        return folder  # without a lock, for which one would have to be allowed to write
    with alone(_beside(folder, "lock")):
        with writing_to(folder):
            tidy_folder(folder)
        if not force and _is_there(folder):
            _clear(archive)
            return folder
        remote = S3Object(bucket, f"weights/{folder.name}.tar.gz", fetcher.connections)
        stat = fetcher.patiently(remote.stat, 0)
        need_space(checkpoint_dir, int(stat.size * (1 + UNPACKED_SIZE)) - size_on_disk(archive))
        logger.info("%s: %s from %s", folder, gigabytes(stat.size), remote.name)
        started(stat.size)

        def install(path: Path) -> None:
            with atomic_folder(folder) as unpacked:
                unpack(path, folder.name, unpacked)
                _refuse_incomplete(unpacked, folder.name, remote.name)
                _write_record(unpacked, remote.name, stat)

        fetcher.fetch(remote, archive, install)
        _clear(archive)
    return folder


def _missing(folder: Path, name: str) -> list[str]:
    """What a folder lacks that the artifact of that name must have."""
    if name == ARTIFACTS["all-embeddings"]:
        return [] if any(folder.rglob("*.h5")) else ["*.h5"]
    return [file for file in CHECKPOINT_FILES if not (folder / file).exists()]


def _refuse_incomplete(unpacked: Path, name: str, source: str) -> None:
    """An archive of something else must not replace what is there."""
    missing = _missing(unpacked, name)
    if missing:
        raise RefusedFileError(f"{source}: lacks {', '.join(missing)}; nothing of it is kept")


def _clear(archive: Path) -> None:
    """Remove an archive that has been unpacked, or what there is of it."""
    remove(archive)
    clear_part(archive)


def _is_there(folder: Path) -> bool:
    """Whether all is there that belongs to the folder: by its record, or by name if it came here in another way.

    Raises
    ------
    DownloadError
        If something is there that is not whole.
    """
    if not folder.exists():
        return False
    record = folder / RECORD
    try:
        sizes = json.loads(record.read_text(encoding="utf-8"))["files"] if record.exists() else {}
        wrong = _missing(folder, folder.name) + [
            name
            for name, size in sizes.items()
            if not (folder / name).exists() or (folder / name).stat().st_size != size
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        wrong = [RECORD]
    if wrong:
        raise DownloadError(f"{folder}: is there, but {wrong[0]} is missing or damaged; --force replaces the folder")
    logger.info("%s: complete already", folder)
    return True


def _write_record(folder: Path, source: str, stat: Stat) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
    date = datetime.now(UTC).isoformat("T", "seconds")
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    write_json(
        folder / RECORD, {"source": source, "etag": stat.version, "size": stat.size, "date": date, "files": files}
    )


def _beside(folder: Path, purpose: str) -> Path:
    """A hidden neighbour of the folder, on the same file system."""
    return folder.with_name(f".{folder.name}.{purpose}")
