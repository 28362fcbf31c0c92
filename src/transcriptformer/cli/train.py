"""`transcriptformer train`: train or fine-tune a model."""

from pathlib import Path
from typing import Annotated

from transcriptformer.cli.options import (
    AllowExternalLinks,
    ConfigOverride,
    Debug,
    Device,
    DuplicateGenes,
    GeneColName,
    GeneMap,
    Layer,
    Modality,
    NDataWorkers,
    NumGpus,
    NumNodes,
    Precision,
    RecoverCounts,
    RemoveDuplicateGenes,
    Resume,
    UseRawOption,
    input_settings,
    option,
    paths_setting,
)


def train(
    data_file: Annotated[
        list[str] | None,
        option("h5ad file or zarr store with raw counts; wildcards allowed; repeatable.", metavar="FILE"),
    ] = None,
    config: Annotated[Path | None, option("Recipe with any keys of conf/train_config.yaml.", metavar="YAML")] = None,
    protein_embedding: Annotated[
        list[Path] | None, option("From scratch: protein embeddings of the genes; repeatable.", metavar="FILE")
    ] = None,
    checkpoint_path: Annotated[Path | None, option("Checkpoint to start from.", metavar="DIR")] = None,
    validation_file: Annotated[
        list[str] | None, option("Cells held out for validation; repeatable.", metavar="FILE")
    ] = None,
    validation_fraction: Annotated[
        float | None, option("Fraction of cells held out without such files.", metavar="SHARE", default=0.1)
    ] = None,
    output_path: Annotated[Path | None, option("Output folder.", metavar="DIR", default="./training_results")] = None,
    label_column: Annotated[
        str | None, option("Column of obs with labels to predict, such as cell_type.", metavar="NAME")
    ] = None,
    freeze: Annotated[list[str] | None, option("Module to freeze; repeatable.", metavar="MODULE")] = None,
    lora_rank: Annotated[int | None, option("Rank of LoRA updates.", metavar="INT", default="0, no LoRA")] = None,
    new_assay: Annotated[
        list[str] | None,
        option("Assay to add, initialized like a known one; repeatable.", metavar="NAME[=LIKE]"),
    ] = None,
    max_epochs: Annotated[int | None, option("Passes over the training cells.", metavar="INT", default=10)] = None,
    max_steps: Annotated[int | None, option("Maximum optimizer steps.", metavar="INT")] = None,
    patience: Annotated[
        int | None, option("Stop after this many validations without improvement.", metavar="INT")
    ] = None,
    batch_size: Annotated[
        int | None, option("Cells per optimizer step, over all processes.", metavar="INT", default=64)
    ] = None,
    learning_rate: Annotated[float | None, option("Peak learning rate.", metavar="NUMBER", default="3e-4")] = None,
    gene_col_name: GeneColName = None,
    gene_map: GeneMap = None,
    layer: Layer = None,
    modality: Modality = None,
    use_raw: UseRawOption = None,
    recover_counts: RecoverCounts = None,
    duplicate_genes: DuplicateGenes = None,
    remove_duplicate_genes: RemoveDuplicateGenes = None,
    precision: Precision = None,
    device: Device = None,
    num_gpus: NumGpus = None,
    num_nodes: NumNodes = None,
    n_data_workers: NDataWorkers = None,
    seed: Annotated[
        int | None, option("Seed of weights, cell order, dropout and split.", metavar="INT", default=0)
    ] = None,
    allow_external_links: AllowExternalLinks = None,
    resume: Resume = False,
    config_override: ConfigOverride = None,
    debug: Debug = False,
) -> None:
    """Train a model on raw counts, from scratch or from a checkpoint.

    The output folder contains a checkpoint for `inference`, a table and a plot of the losses, and the training state.
    """
    options: dict[str, object] = {
        **input_settings(
            *(gene_col_name, gene_map, layer, modality, use_raw, recover_counts),
            *(duplicate_genes, remove_duplicate_genes, allow_external_links),
        ),
        "model.data_config.n_data_workers": n_data_workers,
        "training.data_files": data_file or None,
        "training.protein_embeddings": paths_setting(protein_embedding),
        "training.checkpoint_path": checkpoint_path and str(checkpoint_path),
        "training.validation_files": validation_file or None,
        "training.validation_fraction": validation_fraction,
        "training.output_path": output_path and str(output_path),
        "training.label_column": label_column,
        "training.freeze": freeze or None,
        "training.lora_rank": lora_rank,
        "training.new_aux_values": _new_values(new_assay or []),
        "training.max_epochs": max_epochs,
        "training.max_steps": max_steps,
        "training.patience": patience,
        "training.batch_size": batch_size,
        "training.learning_rate": learning_rate,
        "training.precision": precision,
        "training.device": device,
        "training.num_gpus": num_gpus,
        "training.num_nodes": num_nodes,
        "training.seed": seed,
        "training.resume": resume or None,
    }
    from transcriptformer.cli.reporting import StepProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable("--resume"):
        from transcriptformer.training.config import load_train_config
        from transcriptformer.training.run import fit

        checked = load_train_config(options, config_override or [], config)
        with StepProgress() as progress:
            trained = fit(checked, progress.update)
        if trained is not None:
            say(trained.describe())


def _new_values(assays: list[str]) -> dict[str, dict[str, str]] | None:
    """Convert `--new-assay` to its configuration value: assays to add, each with the one it starts from."""
    pairs = (assay.partition("=") for assay in assays)
    values = {name.strip(): like.strip() or "mean" for name, _, like in pairs}
    return {"assay": values} if values else None
