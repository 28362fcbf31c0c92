"""Download published weights and protein embeddings from a public S3 bucket."""

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
    exclusive_lock,
    format_size,
    part_path,
    remove_part,
    require_free_space,
    size_on_disk,
    translated_write_errors,
    write_json,
)
from transcriptformer.fetching.s3 import S3Object
from transcriptformer.storage.atomic import atomic_folder, backup_path, clean_up_folder, remove, temporary_path

logger = logging.getLogger(__name__)

BUCKET = "czi-transcriptformer"

ARTIFACTS = {
    "tf-sapiens": "tf_sapiens",
    "tf-exemplar": "tf_exemplar",
    "tf-metazoa": "tf_metazoa",
    "all-embeddings": "all_embeddings",
}
"""Downloadable artifacts and their folders."""

RECORD = "download.json"
"""File in each folder that records its source and contents."""

CHECKPOINT_FILES = ("config.json", "model_weights.pt", "vocabs")
"""Required files of a checkpoint."""

UNPACKED_RATIO = 1.2
"""Estimated size of the unpacked contents relative to the archive; weights barely compress."""


def parse_artifacts(names: list[str]) -> list[str]:
    """Expand `all` and deduplicate names of artifacts.

    Raises
    ------
    UsageError
        If a name is unknown.
    """
    unknown = [name for name in names if name not in ARTIFACTS and name != "all"]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is unknown; choose from {', '.join(ARTIFACTS)}, all")
    return [name for name in ARTIFACTS if name in names or "all" in names]


def download(
    name: str,
    checkpoint_dir: Path,
    fetcher: Fetcher,
    bucket: str = BUCKET,
    force: bool = False,
    started: Callable[[int], object] = lambda n_bytes: None,
) -> Path:
    """Download one artifact to its folder in `checkpoint_dir`, replacing the folder only when complete.

    Parameters
    ----------
    fetcher
        Downloads the archive.
    bucket
        S3 bucket; mirrors have the same keys.
    force
        Download even if the folder is complete.
    started
        Called with the size of the archive when the download starts.

    Returns
    -------
    The folder.

    Raises
    ------
    DownloadError
        If the download fails; the partial archive stays for resumption.
    """
    folder = checkpoint_dir / ARTIFACTS[name]
    archive = _hidden_sibling(folder, "tar.gz")
    leftovers = (archive, part_path(archive), backup_path(folder), temporary_path(folder))  # of a killed run
    if not force and not any(path.exists() for path in leftovers) and _is_complete(folder):
        return folder  # without a lock, which requires write permission
    with exclusive_lock(_hidden_sibling(folder, "lock")):
        with translated_write_errors(folder):
            clean_up_folder(folder)
        if not force and _is_complete(folder):
            _remove_archive(archive)
            return folder
        remote = S3Object(bucket, f"weights/{folder.name}.tar.gz", fetcher.connections)
        stat = fetcher.with_retries(remote.stat, 0)
        require_free_space(checkpoint_dir, int(stat.size * (1 + UNPACKED_RATIO)) - size_on_disk(archive))
        logger.info("%s: %s from %s", folder, format_size(stat.size), remote.name)
        started(stat.size)

        def install(path: Path) -> None:
            with atomic_folder(folder) as unpacked:
                unpack(path, folder.name, unpacked)
                _check_complete(unpacked, folder.name, remote.name)
                _write_record(unpacked, remote.name, stat)

        fetcher.fetch(remote, archive, install)
        _remove_archive(archive)
    return folder


def _missing(folder: Path, name: str) -> list[str]:
    """Return the required files of an artifact that are missing in a folder."""
    if name == ARTIFACTS["all-embeddings"]:
        return [] if any(folder.rglob("*.h5")) else ["*.h5"]
    return [file for file in CHECKPOINT_FILES if not (folder / file).exists()]


def _check_complete(unpacked: Path, name: str, source: str) -> None:
    """Refuse an incomplete archive, which must not replace an existing folder."""
    missing = _missing(unpacked, name)
    if missing:
        raise RefusedFileError(f"{source}: {', '.join(missing)} missing in the archive; it was not installed")


def _remove_archive(archive: Path) -> None:
    """Delete an archive, complete or partial."""
    remove(archive)
    remove_part(archive)


def _is_complete(folder: Path) -> bool:
    """Whether a folder is complete, according to its record or, without one, to the required files.

    Raises
    ------
    DownloadError
        If the folder exists but is incomplete.
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
        raise DownloadError(f"{folder}: {wrong[0]} is missing or damaged; add --force to replace the folder")
    logger.info("%s: already complete", folder)
    return True


def _write_record(folder: Path, source: str, stat: Stat) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
    date = datetime.now(UTC).isoformat("T", "seconds")
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    write_json(
        folder / RECORD, {"source": source, "etag": stat.version, "size": stat.size, "date": date, "files": files}
    )


def _hidden_sibling(folder: Path, suffix: str) -> Path:
    """Return the path of a hidden file next to the folder, on the same file system."""
    return folder.with_name(f".{folder.name}.{suffix}")
