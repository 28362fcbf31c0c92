"""`transcriptformer generate`: new cells, and genes that cells lack."""

from pathlib import Path
from typing import Annotated, Any

from transcriptformer.cli.options import (
    ConfigOverride,
    Debug,
    Device,
    GeneMap,
    Precision,
    batch_size_setting,
    option,
)


def generate(
    checkpoint_path: Annotated[Path, option("Checkpoint folder.", metavar="DIR")],
    n_cells: Annotated[int | None, option("Number of new cells.", metavar="INT", default="as in --like")] = None,
    gene: Annotated[
        list[str] | None, option("Gene that new cells begin with; repeatable.", metavar="GENE[=COUNT]")
    ] = None,
    data_file: Annotated[
        str | None, option("File with cells, to complete parts of, or to impute.", metavar="FILE")
    ] = None,
    keep: Annotated[
        float | None, option("Share of each cell's genes that is kept.", metavar="NUMBER", default=0.5)
    ] = None,
    like: Annotated[
        str | None, option("File with cells whose lengths, totals and metadata to take.", metavar="FILE")
    ] = None,
    n_genes: Annotated[int | None, option("Genes per cell.", metavar="INT", default="as in the file")] = None,
    total_counts: Annotated[
        float | None, option("Total count per cell.", metavar="NUMBER", default="as in the file")
    ] = None,
    assay: Annotated[str | None, option("Assay of the cells.", metavar="NAME", default="as in the file")] = None,
    candidates: Annotated[
        str | None, option("Genes to draw from, one a line, or a species.", metavar="FILE|SPECIES", default="all genes")
    ] = None,
    temperature: Annotated[
        float, option("Below 1, more probable genes; above, less probable ones.", metavar="NUMBER", default=1)
    ] = 1.0,
    top_p: Annotated[
        float, option("Draw from the genes that together have this probability.", metavar="NUMBER", default=1)
    ] = 1.0,
    count_rounds: Annotated[
        int | None, option("Times to draw counts again, given all genes.", metavar="INT", default=1)
    ] = None,
    seed: Annotated[int, option("Seed of genes, counts and orders.", metavar="INT", default=0)] = 0,
    impute: Annotated[
        str | None, option("Predict genes that cells lack, without drawing.", metavar="FILE|GENE,GENE,…|all")
    ] = None,
    output_path: Annotated[Path, option("Output folder.", metavar="DIR", default="./generation_results")] = Path(
        "generation_results"
    ),
    output_filename: Annotated[
        str, option("Name of the output, .h5ad or .zarr.", metavar="NAME", default="cells.h5ad")
    ] = "cells.h5ad",
    plot: Annotated[Path | None, option("Draw a UMAP of real and generated cells.", metavar="FILE")] = None,
    gene_map: GeneMap = None,
    batch_size: Annotated[str | None, option("Maximum cells per batch.", metavar="INT|auto", default="auto")] = None,
    precision: Precision = None,
    device: Device = None,
    config_override: ConfigOverride = None,
    debug: Debug = False,
) -> None:
    """Draw new cells from the model, or predict genes that cells lack (--impute).

    Cells begin with nothing, with genes (--gene), or with a part of each cell of a file (--data-file).
    """
    options: dict[str, object] = {
        "model.data_config.gene_map": gene_map,
        "model.inference_config.batch_size": batch_size_setting(batch_size),
        "model.inference_config.precision": precision,
        "model.inference_config.device": device,
        "model.inference_config.output_filename": output_filename,
    }
    drawing: dict[str, Any] = {
        "n_cells": n_cells,
        "keep": keep,
        "like": like,
        "n_genes": n_genes,
        "total_counts": total_counts,
        "candidates": candidates,
        "count_rounds": count_rounds,
    }
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable():
        from transcriptformer.checkpoint.load import load_checkpoint
        from transcriptformer.checkpoint.published import load_config
        from transcriptformer.data.store import find_file
        from transcriptformer.generation.command import Order, check_order
        from transcriptformer.runs.output import write_anndata
        from transcriptformer.runtime.memory import keep_freed_memory

        given = {name: value for name, value in drawing.items() if value is not None}
        given |= {"temperature": temperature, "top_p": top_p, "seed": seed, "assay": assay}
        data_file = None if data_file is None else find_file(data_file)
        if like is not None:
            given["like"] = find_file(like, "--like")
        order = Order(gene or [], data_file, impute, output_path / output_filename, plot, given)
        check_order(order)
        checkpoint = load_checkpoint(checkpoint_path, load_config(checkpoint_path, options, config_override or []))
        if checkpoint.device.type == "cpu":
            keep_freed_memory()
        unit, action = ("genes", "generating") if impute is None else ("cells", "imputing")
        with CountProgress(unit, action) as progress:
            cells = order.fill(checkpoint, progress.update)
        write_anndata(cells, order.output)
        say(f"{cells.n_obs} cells, {cells.n_vars} genes in {order.output}")
        if plot is not None:
            order.draw_umap(cells, checkpoint)
            say(f"UMAP in {plot}")
