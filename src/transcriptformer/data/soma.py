"""TileDB-SOMA experiments, which are loaded into memory."""

import logging
import os
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from transcriptformer.data.counts import LoadedWhole, check_memory
from transcriptformer.data.metadata import MetadataInMemory
from transcriptformer.data.places import Contents, Place, X
from transcriptformer.data.store import Location, is_url
from transcriptformer.errors import DataError, TranscriptFormerError, UsageError, one_line

logger = logging.getLogger(__name__)

MEASUREMENT = "RNA"

_X_LAYER = "data"
"""Default name of the layer that tiledbsoma writes `X` to."""

_BYTES_PER_ENTRY = 60
"""Peak memory of reading an entry of an array and converting it to CSR."""


def is_soma(location: Location) -> bool:
    """Whether a location is a TileDB group: a folder with its files, or a URL that ends in `soma` or is in TileDB."""
    if is_url(location):
        return str(location).startswith("tiledb://") or str(location).rstrip("/").endswith("soma")
    return os.path.isdir(os.path.join(location, "__group"))  # noqa: PTH112, PTH118


def contents_of_experiment(location: Location) -> Contents:
    """Return what an experiment holds; a matrix is loaded before its cells are read.

    Raises
    ------
    UsageError
        If tiledbsoma is not installed.
    DataError
        If it is not an experiment, has no RNA, or cannot be read.
    """
    uri = str(location)
    with _Experiment(uri) as experiment:
        if MEASUREMENT not in experiment.ms:
            raise DataError(f"{uri}: has no measurement {MEASUREMENT!r}; it has: {', '.join(experiment.ms) or 'none'}")
        rna = experiment.ms[MEASUREMENT]
        obs, var = _read_frame(experiment.obs, "obs_id"), _read_frame(rna.var, "var_id")
        layers = list(rna.X) if "X" in rna else []
    places = {}
    for layer in layers:
        open_matrix = partial(_Layer, uri, layer, obs["soma_joinid"], var["soma_joinid"])
        places[X if layer == _X_LAYER else layer] = Place(uri, f"X[{layer!r}]", open_matrix, lambda: var)
    return Contents(uri, places, MetadataInMemory(obs))


class _Experiment(AbstractContextManager[Any]):
    """Open experiment; errors in reading it are translated to DataError."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> Any:
        try:
            import tiledbsoma
        except ImportError as error:
            raise UsageError(
                f"--data-file {self.uri}: requires a package that is not installed ({one_line(error)}); "
                'run pip install "transcriptformer[census]"'
            ) from error
        try:
            self.experiment = tiledbsoma.open(self.uri)
        except Exception as error:  # several libraries with their own exceptions
            raise self._unreadable(error) from error
        if not isinstance(self.experiment, tiledbsoma.Experiment):
            self.experiment.close()
            kind = type(self.experiment).__name__
            raise DataError(f"{self.uri}: is a {kind} of TileDB-SOMA; expected an Experiment (with obs and ms)")
        return self.experiment

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.experiment.close()
        if isinstance(error, Exception) and not isinstance(error, TranscriptFormerError):
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(f"{self.uri}: cannot be read as a TileDB-SOMA experiment ({one_line(error)})")


def _read_frame(stored: Any, name: str) -> pd.DataFrame:
    frame = stored.read().concat().to_pandas().sort_values("soma_joinid")
    names = frame.pop(name) if name in frame else frame["soma_joinid"]
    return frame.set_index(pd.Index(names.astype(str).to_numpy(object)))


class _Layer(LoadedWhole):
    """`Matrix` of a layer; `cells` and `genes` are the ids of its rows and columns, ascending."""

    def __init__(self, uri: str, layer: str, cells: pd.Series, genes: pd.Series) -> None:
        super().__init__((len(cells), len(genes)))
        self.uri, self.layer, self.cells, self.genes = uri, layer, cells.to_numpy(), genes.to_numpy()

    def rows(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read some rows without loading the others."""
        with _Experiment(self.uri) as experiment:
            array = experiment.ms[MEASUREMENT].X[self.layer]
            return self._read(array, start, stop, (slice(int(self.cells[start]), int(self.cells[stop - 1])),))

    def _load(self) -> sparse.csr_matrix:
        with _Experiment(self.uri) as experiment:
            array = experiment.ms[MEASUREMENT].X[self.layer]
            action = f"{self.uri}: loading X[{self.layer!r}]"
            check_memory(_BYTES_PER_ENTRY * array.nnz, action, "export some of its cells to an h5ad file")
            logger.info("%s: loading X[%r] into memory", self.uri, self.layer)
            return self._read(array, 0, len(self.cells), ())

    def _read(self, array: Any, start: int, stop: int, ids: tuple[slice, ...]) -> sparse.csr_matrix:
        table = array.read(ids).tables().concat()
        rows, columns, values = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        positions = np.searchsorted(self.cells[start:stop], rows), np.searchsorted(self.genes, columns)
        return sparse.csr_matrix((values, positions), shape=(stop - start, len(self.genes)))
