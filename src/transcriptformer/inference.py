"""Cells in, embeddings out."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import anndata
import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from transcriptformer.checkpoint import Checkpoint, load_checkpoint
from transcriptformer.config import Config
from transcriptformer.data.dataset import Batch, CellDataset, CellStatistics, as_is
from transcriptformer.errors import UsageError
from transcriptformer.lightning import TranscriptFormerModule
from transcriptformer.output import Collector, check_storable, check_writable, select_obs, to_anndata, write_h5ad

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | anndata.AnnData

OnProgress = Callable[[int, int], None]
"""Called with how many cells are done and how many there are."""


def embed(
    sources: Source | Sequence[Source],
    checkpoint: Checkpoint,
    config: Config,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Embed the cells of one source or of several, in order.

    Parameters
    ----------
    sources
        h5ad file or AnnData object, or a list of them; they are left as they are.
    checkpoint
        From `load_checkpoint`, with the same `config`.
    config
        What to compute; see `transcriptformer.config`.
    on_progress
        Called before the first and after every batch.

    Returns
    -------
    An AnnData with the cells that passed the filters: `obs` as found, `obsm['embeddings']` (cells, D) float32,
    `uns['llh']` where asked for, and `uns['transcriptformer']`, which says how it was made.

    Raises
    ------
    TranscriptFormerError
        If a source, or an option that speaks of it, cannot be used.
    """
    sources = _as_list(sources)
    data, inference = config.model.data_config, config.model.inference_config
    dataset = CellDataset(
        sources, checkpoint.gene_vocab, checkpoint.aux_vocabs, data, config.model.model_config.seq_len
    )
    obs = select_obs(dataset.obs, inference.obs_keys)
    check_storable(obs)
    _tell(dataset.statistics, config)

    collector = Collector(len(dataset))
    callbacks: list[pl.Callback] = [collector]
    if on_progress is not None:
        on_progress(0, len(dataset))
        callbacks.append(_Progress(on_progress, len(dataset)))
    _predict(dataset, checkpoint, config, callbacks)
    return to_anndata(obs, collector, _provenance(sources, checkpoint, config))


def run(
    data_files: Sequence[Path], checkpoint_path: Path, config: Config, on_progress: OnProgress | None = None
) -> tuple[Path, anndata.AnnData]:
    """What `transcriptformer inference` does: embed the cells of `data_files` and write one h5ad file.

    Returns
    -------
    The file, in `output_path` of the configuration, and what was written to it.

    Raises
    ------
    TranscriptFormerError
        If an input cannot be used or the output not be written; then no output file is left.
    """
    inference = config.model.inference_config
    output = Path(inference.output_path) / inference.output_filename
    check_writable(output)
    if output.resolve() in [file.resolve() for file in data_files]:
        raise UsageError(f"--output-filename {output}: is an input; the result would replace it")
    result = embed(data_files, load_checkpoint(checkpoint_path, config), config, on_progress)
    write_h5ad(result, output)
    return output, result


def _as_list(sources: Source | Sequence[Source]) -> list[Path | anndata.AnnData]:
    several = [sources] if isinstance(sources, str | Path | anndata.AnnData) else list(sources)
    if not several:
        raise UsageError("there is nothing to embed: no file and no AnnData was given")
    return [Path(source) if isinstance(source, str) else source for source in several]


def _predict(dataset: CellDataset, checkpoint: Checkpoint, config: Config, callbacks: list[pl.Callback]) -> None:
    on_gpu = checkpoint.device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_sampler=BatchSampler(
            SequentialSampler(dataset), min(config.model.inference_config.batch_size, len(dataset)), drop_last=False
        ),
        collate_fn=as_is,
        num_workers=config.model.data_config.n_data_workers,
        pin_memory=on_gpu,
    )
    with _quiet_lightning():
        trainer = pl.Trainer(
            accelerator=checkpoint.device.type,
            devices=1,
            plugins=[LightningEnvironment()],  # one process, also where a cluster's scheduler has started several
            precision="32-true",  # the weights are in the run's precision already
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.predict(TranscriptFormerModule(checkpoint.model, config), loader, return_predictions=False)
        except SystemExit:  # Lightning's answer to Ctrl-C, which would end a notebook's kernel
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning has to say about hardware it does not use, its other products and its own imports."""
    lightning_logger = logging.getLogger("pytorch_lightning")
    level = lightning_logger.level
    lightning_logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        lightning_logger.setLevel(level)


class _Progress(pl.Callback):
    def __init__(self, on_progress: OnProgress, n_cells: int) -> None:
        self.on_progress, self.n_cells, self.n_done = on_progress, n_cells, 0

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, *unused: object
    ) -> None:
        self.n_done += len(batch.rows)
        self.on_progress(self.n_done, self.n_cells)


def _tell(cells: CellStatistics, config: Config) -> None:
    dropped = f" of {cells.n_read} (the filters dropped the others)" if cells.n_kept < cells.n_read else ""
    seq_len = config.model.model_config.seq_len
    notes = [
        (cells.n_empty, "without any gene of the vocabulary"),
        (cells.n_too_long, f"with more than {seq_len} genes, of which the model sees {seq_len}"),
        *((n, f"of an {column} unknown to the checkpoint") for column, n in cells.unknown_aux.items()),
    ]
    told = "".join(f"; {n} {what}" for n, what in notes if n)
    logger.info("%d cells%s%s", cells.n_kept, dropped, told)


def _provenance(sources: Sequence[Path | anndata.AnnData], checkpoint: Checkpoint, config: Config) -> dict[str, object]:
    return {
        "version": version("transcriptformer"),
        "checkpoint": checkpoint.path.resolve().name,
        "weights_sha256": checkpoint.weights_sha256(),
        "config": config.to_json(),
        # A path may hold bytes that are not text, which HDF5 cannot store.
        "data_files": [
            str(source).encode(errors="replace").decode() if isinstance(source, Path) else "AnnData"
            for source in sources
        ],
    }
