"""`transcriptformer train`: options become a configuration, and the work is done elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from transcriptformer.cli.inference import UseRaw, use_raw_setting


def train(
    data_file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="h5ad file or zarr store with raw counts; may be repeated, or hold * and **."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="YAML", help="A recipe: any part of what conf/train_config.yaml holds.")
    ] = None,
    protein_embedding: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="From scratch: protein embeddings of the genes; may be repeated."),
    ] = None,
    checkpoint_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Train on from this checkpoint instead of from scratch.")
    ] = None,
    validation_file: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Cells to validate on; may be repeated.")
    ] = None,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Share of the cells to validate on, without such files.", show_default="0.1"
        ),
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of what comes out.", show_default="./training_results")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of obs that a head learns to tell, such as cell_type.")
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="A module that is not trained; may be repeated.")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(metavar="INT", help="Learn updates of this rank (LoRA) instead of all weights.")
    ] = None,
    new_assay: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=LIKE]",
            help="An assay to add, which starts like a known one, or from their mean; repeatable.",
        ),
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option(metavar="INT", help="Passes over the cells.", show_default="10")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(metavar="INT", help="Most steps of the optimizer.")] = None,
    patience: Annotated[
        int | None, typer.Option(metavar="INT", help="Stop after so many validations without a better loss.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="INT", help="Cells per step, of all processes.", show_default="64")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="At its highest.", show_default="3e-4")
    ] = None,
    gene_col_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of var with Ensembl gene ids; 'index' for its index.",
            show_default="ensembl_id",
        ),
    ] = None,
    use_raw: Annotated[
        UseRaw | None,
        typer.Option(
            metavar="true|false|auto",
            help="Counts from .raw.X (true), .X (false), or .raw.X where there is one (auto).",
            case_sensitive=False,
            show_default="auto",
        ),
    ] = None,
    remove_duplicate_genes: Annotated[
        bool | None,
        typer.Option(
            "--remove-duplicate-genes", help="Keep the first column of each gene id instead of refusing duplicates."
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="16-mixed (fp16 on a GPU; bf16 on a CPU that has it, else 32), bf16-mixed or 32.",
            metavar="16-mixed|bf16-mixed|32",
            show_default="16-mixed",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute.", metavar="auto|cpu|cuda|mps", show_default="auto")
    ] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(metavar="INT", help="GPUs to use, -1 for all; on a CPU, processes.", show_default="1"),
    ] = None,
    num_nodes: Annotated[
        int | None,
        typer.Option(metavar="INT", help="Machines, on each of which the command is started.", show_default="1"),
    ] = None,
    n_data_workers: Annotated[
        int | None, typer.Option(metavar="INT", help="Processes that read, per process.", show_default="0")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="INT", help="Of weights, order and dropout.", show_default="0")
    ] = None,
    allow_external_links: Annotated[
        bool | None,
        typer.Option("--allow-external-links", help="Follow links in inputs to other files, and virtual datasets."),
    ] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on with a run of the same that was ended before it was done.")
    ] = None,
    config_override: Annotated[
        list[str] | None,
        typer.Option(
            help="Any configuration value, such as training.weight_decay=0.01; applied last, repeatable.",
            metavar="KEY.PATH=VALUE",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a model on raw counts, from scratch or from a checkpoint.

    What comes out is a folder with a checkpoint for `inference`, the losses as a table and a picture, and what a run
    that was ended goes on from.
    """
    options: dict[str, object] = {
        "model.data_config.gene_col_name": gene_col_name,
        "model.data_config.use_raw": use_raw_setting(use_raw),
        "model.data_config.remove_duplicate_genes": remove_duplicate_genes,
        "model.data_config.n_data_workers": n_data_workers,
        "model.data_config.allow_external_links": allow_external_links,
        "training.data_files": data_file or None,
        "training.protein_embeddings": [str(p) for p in protein_embedding or []] or None,
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
        "training.resume": resume,
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
    """Names and what they start from, as the configuration has them; of the column `assay`."""
    pairs = (assay.partition("=") for assay in assays)
    values = {name.strip(): like.strip() or "mean" for name, _, like in pairs}
    return {"assay": values} if values else None
