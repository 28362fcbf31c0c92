"""Download datasets from CELLxGENE Discover, one folder each.

`python -m transcriptformer.data.bulk_download` is `transcriptformer download-data`.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from transcriptformer.errors import DownloadError, TranscriptFormerError, one_line
from transcriptformer.fetching.fetcher import (
    DamagedFileError,
    Fetcher,
    RefusedFileError,
    exclusive_lock,
    part_path,
    remove_part,
    require_free_space,
    size_on_disk,
    write_json,
)
from transcriptformer.fetching.http import HttpFile, http_get, translated_errors

logger = logging.getLogger(__name__)

API = "https://api.cellxgene.cziscience.com"
API_VARIABLE = "TRANSCRIPTFORMER_CELLXGENE_API"
"""Environment variable that overrides the API address."""

FILE, SUCCESS, METADATA = "full.h5ad", "__success__", "dataset_metadata.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Ids that are valid folder names."""

_COLLECTION_ADDRESS = re.compile(r"https?://(.*/collections|(dx[.])?doi[.]org)/")

CHUNK_ROWS = 1000
"""Rows of a dense matrix, or values of a sparse one, read at once."""

Dataset = dict[str, Any]
"""Metadata of a dataset from the API."""


@dataclass(frozen=True)
class Selection:
    """Filters for datasets; case-insensitive, and an empty tuple matches all.

    Attributes
    ----------
    species
        Latin names.
    tissue, assay, disease
        Labels; a dataset must have at least one of each.
    collection
        Ids, addresses, DOIs or names of collections.
    max_datasets
        Maximum number of datasets; the first ones are kept.
    """

    species: tuple[str, ...]
    tissue: tuple[str, ...] = ()
    assay: tuple[str, ...] = ()
    disease: tuple[str, ...] = ()
    collection: tuple[str, ...] = ()
    max_datasets: int | None = None


class Asset(NamedTuple):
    """The h5ad file of a dataset, and its size in bytes, if known."""

    url: str
    size: int | None


class Outcome(NamedTuple):
    """Result of a dataset's download.

    Attributes
    ----------
    status
        "downloaded", "already present" or "failed".
    reason
        Why the download failed.
    """

    dataset_id: str
    status: str
    n_bytes: int = 0
    cells: int = 0
    genes: int = 0
    reason: str = ""


def api_address() -> str:
    """Return the address of the API."""
    return os.environ.get(API_VARIABLE, API).rstrip("/")


def list_datasets(fetcher: Fetcher) -> list[Dataset]:
    """List all datasets of the API.

    Raises
    ------
    DownloadError
        If the API cannot be reached, or returns anything but a list of datasets.
    """
    return fetcher.with_retries(_read_list, f"{api_address()}/curation/v1/datasets")


def _read_list(url: str) -> list[Dataset]:
    with translated_errors(url), http_get(url, {"Accept-Encoding": "gzip"}) as response:
        body = response.content
    try:
        datasets = json.loads(body)
        if isinstance(datasets, list) and datasets and all(isinstance(d["dataset_id"], str) for d in datasets):
            return datasets
    except (ValueError, TypeError, KeyError):
        pass
    raise DownloadError(f"{url}: the response is not a list of datasets; check for a proxy or a log-in page")


def select_datasets(datasets: Iterable[Dataset], wanted: Selection) -> list[Dataset]:
    """Select the datasets that match and have primary data of exactly one organism.

    Raises
    ------
    DownloadError
        If a species has no datasets, or no dataset matches.
    """
    usable = [dataset for dataset in datasets if len(_labels(dataset, "organism")) == 1 and _is_primary(dataset)]
    species = Counter(label for dataset in usable for label in _labels(dataset, "organism"))
    for name in wanted.species:
        if name.lower() not in species:
            known = ", ".join(f"{label} ({n:,})" for label, n in species.most_common())
            raise DownloadError(f"--species {name!r}: no datasets; available species: {known or 'none'}")
    matches = {dataset["dataset_id"]: dataset for dataset in usable if _matches(dataset, wanted)}  # deduplicated
    chosen = list(matches.values())[: wanted.max_datasets]
    if not chosen:
        raise DownloadError("no dataset matches all of --tissue, --assay, --disease and --collection")
    return chosen


def _matches(dataset: Dataset, wanted: Selection) -> bool:
    labels = {
        "organism": wanted.species,
        "tissue": wanted.tissue,
        "assay": wanted.assay,
        "disease": wanted.disease,
    }
    if any(values and not _labels(dataset, key) & {v.lower() for v in values} for key, values in labels.items()):
        return False
    collections = {_COLLECTION_ADDRESS.sub("", name.strip().rstrip("/").lower()) for name in wanted.collection}
    names = (dataset.get(key) for key in ("collection_id", "collection_doi", "collection_name"))
    return not collections or bool(collections & {str(name).lower() for name in names if name})


def _labels(dataset: Dataset, key: str) -> set[str]:
    """Return the lower-case labels of a property."""
    entries = dataset.get(key)
    return {str(e.get("label")).lower() for e in entries if isinstance(e, dict)} if isinstance(entries, list) else set()


def _is_primary(dataset: Dataset) -> bool:
    values = dataset.get("is_primary_data")
    return any(values) if isinstance(values, list) else bool(values)


def get_asset(dataset: Dataset) -> Asset:
    """Return the h5ad file of a dataset.

    Raises
    ------
    DownloadError
        If it has none.
    """
    for asset in dataset.get("assets") or []:
        if isinstance(asset, dict) and asset.get("filetype") == "H5AD" and isinstance(asset.get("url"), str):
            size = asset.get("filesize")
            return Asset(asset["url"], size if isinstance(size, int) else None)
    raise DownloadError(f"{dataset['dataset_id']}: the dataset has no H5AD file")


def download_datasets(
    datasets: Sequence[Dataset],
    output_dir: Path,
    fetcher: Fetcher,
    processes: int = 4,
    save_metadata: bool = True,
    expect: Callable[[int], object] = lambda n_bytes: None,
) -> list[Outcome]:
    """Download datasets to `<output_dir>/<dataset_id>/full.h5ad` in parallel; failures do not stop the others.

    `__success__` next to each complete file records what was verified. With `save_metadata`, the API's metadata of the
    complete datasets is added to `dataset_metadata.json`.

    Parameters
    ----------
    expect
        Called with the total number of bytes to download.

    Raises
    ------
    DownloadError
        If the disk is full, or the folder cannot be written.
    """
    with exclusive_lock(output_dir / ".lock"):
        assets = [(asset, output_dir / _id(d)) for d in datasets if (asset := find_asset(d))]
        sizes = [(asset.size or 0, folder / FILE) for asset, folder in assets if not _is_verified(folder, asset)]
        require_free_space(output_dir, sum(max(0, size - size_on_disk(target)) for size, target in sizes))
        expect(sum(size for size, _ in sizes))
        outcomes: dict[str, Outcome] = {}
        threads = ThreadPoolExecutor(processes, thread_name_prefix="download")
        try:
            jobs = {threads.submit(_download_dataset, d, output_dir / _id(d), fetcher): _id(d) for d in datasets}
            for job in as_completed(jobs):
                outcomes[jobs[job]] = job.result()
        except BaseException:
            fetcher.stopping.set()
            raise
        finally:
            threads.shutdown(cancel_futures=True)
            if save_metadata:
                complete = {name for name, outcome in outcomes.items() if outcome.status != "failed"}
                try:
                    _save_metadata([d for d in datasets if _id(d) in complete], output_dir)
                except DownloadError as error:
                    if not fetcher.stopping.is_set():
                        raise
                    logger.warning("%s", error)  # must not replace what has stopped the downloads
    return [outcomes[_id(dataset)] for dataset in datasets]


def _id(dataset: Dataset) -> str:
    name = dataset["dataset_id"]
    if not _NAME.fullmatch(name):
        raise DownloadError(f"dataset id {name!r} from the API is not a valid folder name")
    return name


def find_asset(dataset: Dataset) -> Asset | None:
    """Return the h5ad file of a dataset, or None."""
    try:
        return get_asset(dataset)
    except DownloadError:
        return None


def _download_dataset(dataset: Dataset, folder: Path, fetcher: Fetcher) -> Outcome:
    """Download and verify one dataset, then write its `__success__`."""
    try:
        asset = get_asset(dataset)
        is_present = _is_verified(folder, asset)
        if not is_present:
            success = folder / SUCCESS

            def verify(path: Path) -> tuple[int, int]:
                shape = inspect_h5ad(path)
                success.unlink(missing_ok=True)  # it describes the file that is about to be replaced
                return shape

            with closing(HttpFile(asset.url, asset.size)) as remote:
                cells, genes = fetcher.fetch(remote, folder / FILE, verify)
            _write_success(folder, asset, cells, genes)
        found = json.loads((folder / SUCCESS).read_text(encoding="utf-8"))
        status = "already present" if is_present else "downloaded"
        logger.info("%s: %s, %d cells", folder, status, found["cells"])
        return Outcome(folder.name, status, found["size"], found["cells"], found["genes"])
    except TranscriptFormerError as error:
        if not fetcher.stopping.is_set():
            logger.warning("%s: %s", folder, error)
        return Outcome(folder.name, "failed", reason=str(error))
    except Exception as error:  # must not stop the other downloads
        logger.exception("%s", folder)
        return Outcome(folder.name, "failed", reason=one_line(error))


def _is_verified(folder: Path, asset: Asset) -> bool:
    """Whether this file exists and is verified; a complete file without a record is verified now."""
    file = folder / FILE
    if not file.exists():
        return False
    size = file.stat().st_size
    try:
        found = json.loads((folder / SUCCESS).read_text(encoding="utf-8"))
        if found.keys() >= {"cells", "genes"}:
            return (found["url"], found["size"]) == (asset.url, size) and asset.size in (None, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # killed before the record was written, or downloaded by the published package
    if asset.size not in (None, size) or part_path(file).exists():
        return False
    try:
        cells, genes = inspect_h5ad(file)
    except (DamagedFileError, RefusedFileError):
        return False
    remove_part(file)
    _write_success(folder, asset, cells, genes)
    return True


def inspect_h5ad(path: Path) -> tuple[int, int]:
    """Return the number of cells and genes of an h5ad.

    Raises
    ------
    DamagedFileError
        If it is not a complete h5ad.
    RefusedFileError
        If it has no cells, no genes or no counts.
    DownloadError
        If there is not enough memory to read it.
    """
    try:
        with h5py.File(path, locking=False) as file:
            place = "raw/" if "raw/X" in file else ""
            matrix = file[f"{place}X"]
            is_sparse = isinstance(matrix, h5py.Group)
            cells, genes = map(int, matrix.attrs["shape"] if is_sparse else matrix.shape)
            values = matrix["data"] if is_sparse else matrix
            lengths = [len(file[frame][file[frame].attrs["_index"]]) for frame in ("obs", f"{place}var")]
            blocks = (values[start : start + CHUNK_ROWS] for start in range(0, len(values), CHUNK_ROWS))
            has_counts = any(block.any() for block in blocks)
    except MemoryError as error:
        raise DownloadError(f"{path}: not enough memory to verify it") from error
    except Exception as error:  # h5py raises many types for damaged data
        raise DamagedFileError(f"{path}: not a complete h5ad ({one_line(error)})") from error
    if lengths != [cells, genes] or 0 in (cells, genes) or not has_counts:
        raise RefusedFileError(
            f"{path}: unusable matrix of {cells} cells and {genes} genes {'with' if has_counts else 'without'} counts; "
            f"obs has {lengths[0]} rows and var has {lengths[1]}"
        )
    return cells, genes


def _write_success(folder: Path, asset: Asset, cells: int, genes: int) -> None:
    size, date = (folder / FILE).stat().st_size, datetime.now(UTC).isoformat("T", "seconds")
    record = {"size": size, "cells": cells, "genes": genes, "url": asset.url, "date": date}
    write_json(folder / SUCCESS, record)


def _save_metadata(datasets: Sequence[Dataset], output_dir: Path) -> None:
    """Merge the metadata of datasets into the file written by earlier runs."""
    path = output_dir / METADATA
    try:
        known = {dataset["dataset_id"]: dataset for dataset in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s: cannot be read; metadata is not updated", path)
        return
    write_json(path, list({**known, **{_id(dataset): dataset for dataset in datasets}}.values()))


if __name__ == "__main__":
    import sys

    (command,) = entry_points(group="console_scripts", name="transcriptformer")
    command.load()(["download-data", *sys.argv[1:]])
