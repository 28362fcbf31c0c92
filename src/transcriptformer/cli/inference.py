"""`transcriptformer inference`: options become a configuration, and the work is done elsewhere."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class UseRaw(StrEnum):
    """Values of `--use-raw`."""

    true = "true"
    false = "false"
    auto = "auto"


def use_raw_setting(value: UseRaw | None) -> bool | str | None:
    """The configuration's value."""
    return {"true": True, "false": False, "auto": "auto", None: None}[value]


def batch_size_setting(value: str | None) -> int | str | None:
    """The configuration's value; what is no number is checked there."""
    return int(value) if value is not None and value.isdigit() else value


def inference(
    checkpoint_path: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the checkpoint.")],
    data_file: Annotated[
        list[str],
        typer.Option(
            metavar="FILE", help="h5ad file or zarr store (a path, s3:// or https://) with raw counts; may be repeated."
        ),
    ],
    output_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the result.", show_default="./inference_results")
    ] = None,
    output_filename: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the result.", show_default="embeddings.h5ad")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="INT|auto", help="Most cells in a batch.", show_default="auto")
    ] = None,
    gene_col_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of var with Ensembl gene ids; 'index' for its index.",
            show_default="ensembl_id",
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
    pretrained_embedding: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Protein embeddings of a new species; may be repeated.")
    ] = None,
    clip_counts: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Counts above this are set to it.", show_default="30")
    ] = None,
    filter_to_vocabs: Annotated[
        bool | None,
        typer.Option(
            "--filter-to-vocabs/--no-filter-to-vocabs",
            help="Drop genes outside the vocabulary, or take them as unknown.",
            show_default="filter",
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
    embedding_layer_index: Annotated[
        int | None,
        typer.Option(
            metavar="INT", help="Layer whose output is the embedding, from 0; -1 is the last.", show_default="-1"
        ),
    ] = None,
    model_type: Annotated[
        str | None,
        typer.Option(
            help="transcriptformer; or esm2ce, the genes' protein embeddings without a transformer.",
            metavar="transcriptformer|esm2ce",
            show_default="transcriptformer",
        ),
    ] = None,
    emb_type: Annotated[
        str | None,
        typer.Option(
            help="cell: one vector per cell; cge: one per gene and cell.",
            metavar="cell|cge",
            show_default="cell",
        ),
    ] = None,
    cge_pool: Annotated[
        str | None,
        typer.Option(metavar="gene|COLUMN", help="With cge, the mean per gene, or per gene and value of this column."),
    ] = None,
    remove_duplicate_genes: Annotated[
        bool | None,
        typer.Option(
            "--remove-duplicate-genes", help="Keep the first column of each gene id instead of refusing duplicates."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where to compute.", metavar="auto|cpu|cuda|mps", show_default="auto"),
    ] = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(metavar="INT", help="GPUs to use, -1 for all; on a CPU, processes.", show_default="1"),
    ] = None,
    num_nodes: Annotated[
        int | None,
        typer.Option(metavar="INT", help="Machines, on each of which the command is started.", show_default="1"),
    ] = None,
    oom_dataloader: Annotated[
        bool | None,
        typer.Option(
            "--oom-dataloader/--no-oom-dataloader",
            help="Read counts in blocks as they are needed, or read files into memory first.",
            show_default="in blocks",
        ),
    ] = None,
    n_data_workers: Annotated[
        int | None, typer.Option(metavar="INT", help="Processes that prepare batches.", show_default="0")
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
            help="Any configuration value, such as model.data_config.normalize_to_scale=10000; applied last, may be "
            "given several times.",
            metavar="KEY.PATH=VALUE",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Embed the cells of h5ad files or zarr stores.

    The result is one file (or store) with an embedding per cell, beside the cells' names and metadata.
    """
    options: dict[str, object] = {
        "model.model_type": model_type,
        "model.data_config.gene_col_name": gene_col_name,
        "model.data_config.clip_counts": clip_counts,
        "model.data_config.filter_to_vocabs": filter_to_vocabs,
        "model.data_config.use_raw": use_raw_setting(use_raw),
        "model.data_config.remove_duplicate_genes": remove_duplicate_genes,
        "model.data_config.n_data_workers": n_data_workers,
        "model.data_config.allow_external_links": allow_external_links,
        "model.inference_config.output_path": output_path and str(output_path),
        "model.inference_config.output_filename": output_filename,
        "model.inference_config.batch_size": batch_size_setting(batch_size),
        "model.inference_config.precision": precision,
        "model.inference_config.pretrained_embedding": [str(p) for p in pretrained_embedding or []] or None,
        "model.inference_config.embedding_layer_index": embedding_layer_index,
        "model.inference_config.emb_type": emb_type,
        "model.inference_config.device": device,
        "model.inference_config.cge_pool": cge_pool,
        "model.inference_config.num_gpus": num_gpus,
        "model.inference_config.num_nodes": num_nodes,
        "model.inference_config.resume": resume,
        "model.inference_config.oom_dataloader": oom_dataloader,
    }
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable("--resume"):
        from transcriptformer.checkpoint.published import load_config
        from transcriptformer.inference.output import describe
        from transcriptformer.inference.run import run

        config = load_config(checkpoint_path, options, config_override or [])
        with CountProgress("cells") as progress:
            output = run(data_file, checkpoint_path, config, progress.update)
        if output is not None:
            say(f"{describe(output)} in {output}")
