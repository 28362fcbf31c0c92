"""Download cells of the CELLxGENE Census as h5ad files that are ready for `inference`."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd

from transcriptformer.errors import DownloadError, UsageError, one_line
from transcriptformer.fetching.fetcher import exclusive_lock, translated_write_errors, write_json
from transcriptformer.storage.atomic import atomic_write, make_folder
from transcriptformer.storage.hdf5 import new_hdf5

logger = logging.getLogger(__name__)

CHUNK_CELLS = 8192
"""Cells read into memory at once."""

SELECTION = "census_selection.json"
"""File that records the selection of the files next to it."""


class CellFile(NamedTuple):
    """An output file, and whether this run wrote it."""

    path: Path
    n_cells: int
    is_new: bool


@contextmanager
def open_census(uri: str | None, version: str) -> Iterator[Any]:
    """Open the census of that version, or the one at `uri`.

    Raises
    ------
    UsageError
        If cellxgene-census is not installed.
    DownloadError
        If the census cannot be opened.
    """
    try:
        import cellxgene_census
    except ImportError as error:
        raise UsageError(
            f"--source census requires a package that is not installed ({one_line(error)}); "
            'run pip install "transcriptformer[census]"'
        ) from error
    try:
        census = cellxgene_census.open_soma(uri=uri) if uri else cellxgene_census.open_soma(census_version=version)
    except Exception as error:  # several libraries with their own exceptions
        raise DownloadError(f"census {uri or version}: cannot be opened ({one_line(error)})") from error
    with census:
        yield census


def download_cells(
    census: Any, species: str, output_dir: Path, cell_filter: str = "", cells_per_file: int = 50_000
) -> Iterator[CellFile]:
    """Write raw counts of matching cells to files of `cells_per_file` cells; existing files are kept.

    Parameters
    ----------
    census
        From `open_census`.
    species
        Latin name.
    cell_filter
        SOMA value filter on columns of the census' `obs`; empty: all cells.

    Yields
    ------
    Each complete file: counts in `X`, `ensembl_id` in `var`, the census' metadata in `obs`.

    Raises
    ------
    DownloadError
        If the species is unknown, no cell matches, or the census cannot be read.
    UsageError
        If the folder contains files of another selection.
    """
    cells = find_cells(census, species, cell_filter)
    folder = output_dir / _organism(species)
    with exclusive_lock(output_dir / ".lock"):
        _record_selection(folder, {"build": _build(census), "filter": cell_filter, "cells_per_file": cells_per_file})
        for number, start in enumerate(range(0, len(cells), cells_per_file)):
            path, ids = folder / f"{folder.name}_{number:05d}.h5ad", cells[start : start + cells_per_file]
            is_new = not path.exists()
            if is_new:
                _write_cells(census, folder.name, ids, path)
            yield CellFile(path, len(ids), is_new)


def find_cells(census: Any, species: str, cell_filter: str) -> np.ndarray:
    """Return the ids of matching cells, ascending, int64.

    Raises
    ------
    DownloadError
        If the species is unknown, the filter is invalid, or no cell matches.
    """
    organism, known = _organism(species), census["census_data"]
    check_species(census, [species])
    try:
        tables = known[organism].obs.read(column_names=["soma_joinid"], value_filter=cell_filter or None)
        ids = [table["soma_joinid"].to_numpy() for table in tables]
    except Exception as error:  # of an invalid filter, or of the network
        place = f"--filter {cell_filter!r}: cells cannot be selected" if cell_filter else "census: cells cannot be read"
        raise DownloadError(f"{place} ({one_line(error)})") from error
    cells = np.sort(np.concatenate(ids)) if ids else np.empty(0, np.int64)
    if not len(cells):
        raise DownloadError(f"--filter {cell_filter!r}: no cell of {species} matches")
    return cells


def check_species(census: Any, species: Iterable[str]) -> None:
    """Check that the census contains all species.

    Raises
    ------
    DownloadError
        If one is missing.
    """
    known = census["census_data"]
    for name in species:
        if _organism(name) not in known:
            raise DownloadError(f"--species {name!r}: not in this census; available: {', '.join(known)}")


def _organism(species: str) -> str:
    return species.strip().lower().replace(" ", "_")


def _build(census: Any) -> str:
    """Return the build date of a census, or else its URI."""
    try:
        summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
        return str(summary["census_build_date"])
    except KeyError:
        return str(census.uri)


def _record_selection(folder: Path, selection: dict[str, Any]) -> None:
    """Record the selection of a folder, and refuse to mix it with another one."""
    record = folder / SELECTION
    with translated_write_errors(record):
        make_folder(folder)
        if not record.exists():
            write_json(record, selection)
        text = record.read_text(encoding="utf-8")
    try:
        found = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{record}: cannot be read ({error}); choose another --output-dir") from error
    if found != selection:
        change = next(key for key in selection if found.get(key) != selection[key])
        raise UsageError(
            f"{folder}: contains cells of another selection ({change} was {found.get(change)!r}, is now "
            f"{selection[change]!r}); choose another --output-dir"
        )


def _write_cells(census: Any, organism: str, ids: np.ndarray, path: Path) -> None:
    """Write one file in chunks of cells."""
    import cellxgene_census

    obs: list[pd.DataFrame] = []
    with atomic_write(path) as temporary, new_hdf5(temporary) as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for start in range(0, len(ids), CHUNK_CELLS):
            file.check()
            chunk = ids[start : start + CHUNK_CELLS]
            try:
                with file.signals.undeferred():  # a request may take minutes
                    block = cellxgene_census.get_anndata(census, organism, obs_coords=chunk, X_name="raw")
            except Exception as error:
                raise DownloadError(f"{path}: the census cannot be read ({one_line(error)})") from error
            if obs:
                anndata.io.sparse_dataset(file["X"]).append(block.X)
            else:
                block.X.indptr = block.X.indptr.astype(np.int64)  # the appended matrix may exceed int32
                anndata.io.write_elem(file, "X", block.X)
                anndata.io.write_elem(file, "var", _with_ensembl_id(block.var))
            obs.append(block.obs)
        anndata.io.write_elem(file, "obs", _named(pd.concat(obs)))
    logger.info("%s: %d cells", path, len(ids))


def _with_ensembl_id(var: pd.DataFrame) -> pd.DataFrame:
    ids = var["feature_id"].astype(str).to_numpy()
    return var.assign(ensembl_id=ids).set_index(pd.Index(ids))


def _named(obs: pd.DataFrame) -> pd.DataFrame:
    """Index cells by their id in the census."""
    return obs.set_index(pd.Index(obs["soma_joinid"].astype(str).to_numpy()))
