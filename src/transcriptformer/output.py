"""Predictions become an h5ad file. The only place that knows under which keys results are stored."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter

from transcriptformer.errors import DataError, OutputError, UsageError
from transcriptformer.lightning import Prediction

EMBEDDINGS_KEY, LLH_KEY, PROVENANCE_KEY = "embeddings", "llh", "transcriptformer"


class Collector(BasePredictionWriter):
    """Puts every batch's predictions into the rows of one array per kind.

    Attributes
    ----------
    embedding
        (cells, D), float32; None until a prediction has one.
    llh
        (cells,), float32; None until a prediction has one.
    """

    def __init__(self, n_cells: int) -> None:
        super().__init__(write_interval="batch")
        self.n_cells = n_cells
        self.embedding: np.ndarray | None = None
        self.llh: np.ndarray | None = None

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Prediction, *unused: object
    ) -> None:
        """Store one batch; called by the Trainer."""
        rows = prediction.rows.cpu().numpy()
        if prediction.embedding is not None:
            values = prediction.embedding.float().cpu().numpy()
            if self.embedding is None:
                self.embedding = np.empty((self.n_cells, values.shape[1]), dtype=np.float32)
            self.embedding[rows] = values
        if prediction.llh is not None:
            if self.llh is None:
                self.llh = np.empty(self.n_cells, dtype=np.float32)
            self.llh[rows] = prediction.llh.float().cpu().numpy()


def select_obs(obs: pd.DataFrame, obs_keys: Sequence[str]) -> pd.DataFrame:
    """The columns of cell metadata that go into the output, in the order of the file; `all` stands for every one.

    Raises
    ------
    DataError
        If a column is missing.
    """
    if "all" in obs_keys:
        return obs
    missing = [key for key in obs_keys if key not in obs.columns]
    if missing:
        raise DataError(
            f"model.inference_config.obs_keys: obs has no column {', '.join(map(repr, missing))}; "
            f"its columns are: {', '.join(map(str, obs.columns)) or 'none'}"
        )
    return obs[[column for column in obs.columns if column in obs_keys]]


def to_anndata(obs: pd.DataFrame, collected: Collector, provenance: Mapping[str, object]) -> anndata.AnnData:
    """Results beside the cells' metadata: `obsm['embeddings']`, `uns['llh']`, `uns['transcriptformer']`."""
    with anndata.settings.override(check_uniqueness=False):  # the dataset has told of names that occur twice
        result = anndata.AnnData(obs=obs, uns={PROVENANCE_KEY: dict(provenance)})
    if collected.embedding is not None:
        result.obsm[EMBEDDINGS_KEY] = collected.embedding
    if collected.llh is not None:
        result.uns[LLH_KEY] = pd.DataFrame({LLH_KEY: collected.llh}, index=obs.index.rename(None))
    return result


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try to write there, so that a long run does not fail at its end.

    Raises
    ------
    UsageError
        If that is not possible.
    """
    if path.is_dir():
        raise UsageError(f"--output-filename {path}: is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UsageError(
            f"--output-path {path.parent}: {path.name} cannot be written there ({error.strerror})"
        ) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_storable(obs: pd.DataFrame) -> None:
    """Write every column of cell metadata to an HDF5 file in memory, so that a long run does not fail at its end.

    Raises
    ------
    DataError
        If a column, such as one of mixed types, has no place in an h5ad file.
    """
    with h5py.File("obs", "w", driver="core", backing_store=False) as file, _strings_as_they_are():
        for column in obs.columns:
            try:
                anndata.io.write_elem(file, "column", obs[[column]])
            except Exception as error:  # anndata raises whatever the values lead it to
                raise DataError(
                    f"obs: column {column!r} holds values that h5ad cannot store, such as several types at once "
                    f"({pd.api.types.infer_dtype(obs[column])}); leave it out by model.inference_config.obs_keys"
                ) from error


def describe(result: anndata.AnnData) -> str:
    """What is stored where, in a few words."""
    stored = [f"obsm['{key}'] {result.obsm[key].shape}" for key in result.obsm]
    stored += [f"uns['{LLH_KEY}']"] if LLH_KEY in result.uns else []
    return f"{result.n_obs} cells: {', '.join(stored)}"


def _strings_as_they_are() -> AbstractContextManager[None]:
    return anndata.settings.override(allow_write_nullable_strings=True)


def write_h5ad(result: anndata.AnnData, path: Path) -> None:
    """Write under a temporary name in the same folder, then move into place; a failure leaves nothing behind.

    Raises
    ------
    OutputError
        If the disk is full or the folder cannot be written to.
    """
    temporary = _temporary(path)
    try:
        with _strings_as_they_are():
            # Strings stay strings: the metadata is to be found again exactly as it was.
            result.write_h5ad(temporary, convert_strings_to_categoricals=False)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
