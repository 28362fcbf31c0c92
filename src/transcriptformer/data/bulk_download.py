"""Datasets of CELLxGENE Discover, each in a folder of its own.

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
    alone,
    clear_part,
    need_space,
    part_of,
    size_on_disk,
    write_json,
)
from transcriptformer.fetching.http import HttpFile, ask, in_our_words

logger = logging.getLogger(__name__)

API = "https://api.cellxgene.cziscience.com"
API_VARIABLE = "TRANSCRIPTFORMER_CELLXGENE_API"
"""Environment variable that moves the service's address."""

FILE, SUCCESS, METADATA = "full.h5ad", "__success__", "dataset_metadata.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Ids that can be the name of a folder."""

_COLLECTION_ADDRESS = re.compile(r"https?://(.*/collections|(dx[.])?doi[.]org)/")

ROWS_AT_ONCE = 1000
"""Rows of a dense matrix, or values of a sparse one, in which counts are looked for at a time."""

Dataset = dict[str, Any]
"""What the service tells of a dataset."""


@dataclass(frozen=True)
class Selection:
    """Which datasets are wanted; names in any case, an empty tuple: all.

    Attributes
    ----------
    species
        Latin names.
    tissue, assay, disease
        Labels, of which a dataset needs one each.
    collection
        Ids, addresses, DOIs or names of collections.
    max_datasets
        The first so many.
    """

    species: tuple[str, ...]
    tissue: tuple[str, ...] = ()
    assay: tuple[str, ...] = ()
    disease: tuple[str, ...] = ()
    collection: tuple[str, ...] = ()
    max_datasets: int | None = None


class Asset(NamedTuple):
    """The h5ad file of a dataset; its size in bytes, if the service tells."""

    url: str
    size: int | None


class Outcome(NamedTuple):
    """What became of a dataset.

    Attributes
    ----------
    status
        "downloaded", "there already" or "failed".
    reason
        Why it failed.
    """

    dataset_id: str
    status: str
    n_bytes: int = 0
    cells: int = 0
    genes: int = 0
    reason: str = ""


def api_address() -> str:
    """Of the service that lists the datasets."""
    return os.environ.get(API_VARIABLE, API).rstrip("/")


def list_datasets(fetcher: Fetcher) -> list[Dataset]:
    """All that the service has.

    Raises
    ------
    DownloadError
        If it does not answer, or with something else.
    """
    return fetcher.patiently(_read_list, f"{api_address()}/curation/v1/datasets")


def _read_list(url: str) -> list[Dataset]:
    with in_our_words(url), ask(url, {"Accept-Encoding": "gzip"}) as response:
        body = response.content
    try:
        datasets = json.loads(body)
        if isinstance(datasets, list) and datasets and all(isinstance(d["dataset_id"], str) for d in datasets):
            return datasets
    except (ValueError, TypeError, KeyError):
        pass
    raise DownloadError(f"{url}: answers, but not with a list of datasets; is there a log-in page in between?")


def select_datasets(datasets: Iterable[Dataset], wanted: Selection) -> list[Dataset]:
    """Those of exactly one organism, a wanted one, that hold primary data, and fit the rest of the selection.

    Raises
    ------
    DownloadError
        If a species has no datasets, or nothing is left.
    """
    usable = [dataset for dataset in datasets if len(_labels(dataset, "organism")) == 1 and _is_primary(dataset)]
    species = Counter(label for dataset in usable for label in _labels(dataset, "organism"))
    for name in wanted.species:
        if name.lower() not in species:
            known = ", ".join(f"{label} ({n:,})" for label, n in species.most_common())
            raise DownloadError(f"--species {name!r}: no datasets; there are, with their numbers: {known or 'none'}")
    fitting = {dataset["dataset_id"]: dataset for dataset in usable if _fits(dataset, wanted)}  # each id once
    chosen = list(fitting.values())[: wanted.max_datasets]
    if not chosen:
        raise DownloadError("no dataset fits --tissue, --assay, --disease and --collection together")
    return chosen


def _fits(dataset: Dataset, wanted: Selection) -> bool:
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
    """Of a property that has several, in lower case."""
    entries = dataset.get(key)
    return {str(e.get("label")).lower() for e in entries if isinstance(e, dict)} if isinstance(entries, list) else set()


def _is_primary(dataset: Dataset) -> bool:
    values = dataset.get("is_primary_data")
    return any(values) if isinstance(values, list) else bool(values)


def asset_of(dataset: Dataset) -> Asset:
    """The h5ad among the files of a dataset.

    Raises
    ------
    DownloadError
        If there is none.
    """
    for asset in dataset.get("assets") or []:
        if isinstance(asset, dict) and asset.get("filetype") == "H5AD" and isinstance(asset.get("url"), str):
            size = asset.get("filesize")
            return Asset(asset["url"], size if isinstance(size, int) else None)
    raise DownloadError(f"{dataset['dataset_id']}: the portal has no H5AD of it")


def download_datasets(
    datasets: Sequence[Dataset],
    output_dir: Path,
    fetcher: Fetcher,
    processes: int = 4,
    save_metadata: bool = True,
    expect: Callable[[int], object] = lambda n_bytes: None,
) -> list[Outcome]:
    """Bring datasets to `<output_dir>/<dataset_id>/full.h5ad`, several at once; one that fails does not stop others.

    Beside each whole one lies `__success__`, which tells what was verified. With `save_metadata`, what the service
    tells of those that are there goes into `dataset_metadata.json`.

    Parameters
    ----------
    expect
        Called with the bytes that are to come.

    Raises
    ------
    DownloadError
        If there is no room, or the folder cannot be written.
    """
    with alone(output_dir / ".lock"):
        assets = [(asset, output_dir / _id(d)) for d in datasets if (asset := asset_or_none(d))]
        sizes = [(asset.size or 0, folder / FILE) for asset, folder in assets if not _is_verified(folder, asset)]
        need_space(output_dir, sum(max(0, size - size_on_disk(target)) for size, target in sizes))
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
                there = {name for name, outcome in outcomes.items() if outcome.status != "failed"}
                _save_metadata([d for d in datasets if _id(d) in there], output_dir)
    return [outcomes[_id(dataset)] for dataset in datasets]


def _id(dataset: Dataset) -> str:
    name = dataset["dataset_id"]
    if not _NAME.fullmatch(name):
        raise DownloadError(f"the portal names a dataset {name!r}, which cannot be the name of a folder")
    return name


def asset_or_none(dataset: Dataset) -> Asset | None:
    """Its h5ad, or None."""
    try:
        return asset_of(dataset)
    except DownloadError:
        return None


def _download_dataset(dataset: Dataset, folder: Path, fetcher: Fetcher) -> Outcome:
    """One dataset, which ends with its `__success__`."""
    try:
        asset = asset_of(dataset)
        there = _is_verified(folder, asset)
        if not there:
            success = folder / SUCCESS

            def verify(path: Path) -> tuple[int, int]:
                seen = look_into(path)
                success.unlink(missing_ok=True)  # it speaks of an older file, which is about to go
                return seen

            with closing(HttpFile(asset.url, asset.size)) as remote:
                cells, genes = fetcher.fetch(remote, folder / FILE, verify)
            _write_success(folder, asset, cells, genes)
        found = json.loads((folder / SUCCESS).read_text(encoding="utf-8"))
        logger.info("%s: %s, %d cells", folder, "there already" if there else "downloaded", found["cells"])
        status = "there already" if there else "downloaded"
        return Outcome(folder.name, status, found["size"], found["cells"], found["genes"])
    except TranscriptFormerError as error:
        if not fetcher.stopping.is_set():
            logger.warning("%s: %s", folder, error)
        return Outcome(folder.name, "failed", reason=str(error))
    except Exception as error:  # whatever is odd about this one, the others shall come
        logger.exception("%s", folder)
        return Outcome(folder.name, "failed", reason=one_line(error))


def _is_verified(folder: Path, asset: Asset) -> bool:
    """Whether this very file is there and verified; one that lacks nothing but the record is looked into now."""
    file = folder / FILE
    if not file.exists():
        return False
    size = file.stat().st_size
    try:
        found = json.loads((folder / SUCCESS).read_text(encoding="utf-8"))
        if found.keys() >= {"cells", "genes"}:
            return (found["url"], found["size"]) == (asset.url, size) and asset.size in (None, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # killed just before the end, or fetched by the published package
    if asset.size not in (None, size) or part_of(file).exists():
        return False
    try:
        cells, genes = look_into(file)
    except (DamagedFileError, RefusedFileError):
        return False
    clear_part(file)
    _write_success(folder, asset, cells, genes)
    return True


def look_into(path: Path) -> tuple[int, int]:
    """How many cells and genes an h5ad has.

    Raises
    ------
    DamagedFileError
        If it is not one, or not a whole one.
    RefusedFileError
        If it holds no cells, no genes or no counts.
    DownloadError
        If it cannot be read for another reason.
    """
    try:
        with h5py.File(path, locking=False) as file:
            place = "raw/" if "raw/X" in file else ""
            matrix = file[f"{place}X"]
            is_sparse = isinstance(matrix, h5py.Group)
            cells, genes = map(int, matrix.attrs["shape"] if is_sparse else matrix.shape)
            values = matrix["data"] if is_sparse else matrix
            lengths = [len(file[frame][file[frame].attrs["_index"]]) for frame in ("obs", f"{place}var")]
            blocks = (values[start : start + ROWS_AT_ONCE] for start in range(0, len(values), ROWS_AT_ONCE))
            has_counts = any(block.any() for block in blocks)
    except MemoryError as error:
        raise DownloadError(f"{path}: no memory to look into it") from error
    except Exception as error:  # h5py raises whatever damaged data leads it to
        raise DamagedFileError(f"{path}: not a whole h5ad ({one_line(error)})") from error
    if lengths != [cells, genes] or 0 in (cells, genes) or not has_counts:
        raise RefusedFileError(
            f"{path}: a matrix of {cells} cells and {genes} genes {'with' if has_counts else 'without'} counts, for "
            f"{lengths[0]} named cells and {lengths[1]} named genes"
        )
    return cells, genes


def _write_success(folder: Path, asset: Asset, cells: int, genes: int) -> None:
    size, date = (folder / FILE).stat().st_size, datetime.now(UTC).isoformat("T", "seconds")
    record = {"size": size, "cells": cells, "genes": genes, "url": asset.url, "date": date}
    write_json(folder / SUCCESS, record)


def _save_metadata(datasets: Sequence[Dataset], output_dir: Path) -> None:
    """Add what is known of the datasets that are there to what earlier runs wrote."""
    path = output_dir / METADATA
    try:
        known = {dataset["dataset_id"]: dataset for dataset in json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        known = {}
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s: cannot be read, and is left as it is", path)
        return
    write_json(path, list({**known, **{_id(dataset): dataset for dataset in datasets}}.values()))


if __name__ == "__main__":
    import sys

    (command,) = entry_points(group="console_scripts", name="transcriptformer")
    command.load()(["download-data", *sys.argv[1:]])
