"""Predictions become an h5ad file. The only place that knows under which keys results are stored."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata
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
        result.uns[LLH_KEY] = pd.DataFrame({LLH_KEY: collected.llh}, index=obs.index)
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
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"--output-path {path.parent}: cannot be written to ({error.strerror})") from error


def write_h5ad(result: anndata.AnnData, path: Path) -> None:
    """Write under a temporary name in the same folder, then move into place; a failure leaves nothing behind.

    Raises
    ------
    OutputError
        If the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with anndata.settings.override(allow_write_nullable_strings=True):
            # Strings stay strings: the metadata is to be found again exactly as it was.
            result.write_h5ad(temporary, convert_strings_to_categoricals=False)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
