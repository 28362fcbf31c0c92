"""`transcriptformer score`: likelihoods of cells."""

from pathlib import Path
from typing import Annotated

import typer

from transcriptformer.cli.options import (
    AllowExternalLinks,
    ConfigOverride,
    Debug,
    Device,
    DuplicateGenes,
    GeneColName,
    GeneMap,
    InferenceBatchSize,
    Layer,
    MakeNamesUnique,
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
    run_settings,
)


def score(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files with raw counts.")],
    checkpoint_path: Annotated[Path, option("Checkpoint folder.", metavar="DIR")],
    orders: Annotated[
        int, option("Random orders of genes to average over; 0: the file's order.", metavar="INT", default=1)
    ] = 1,
    per_gene: Annotated[
        str | None, option("Average per gene, or per gene and obs column.", metavar="gene|COLUMN")
    ] = None,
    seed: Annotated[int, option("Seed of the orders.", metavar="INT", default=0)] = 0,
    output_path: Annotated[Path | None, option("Output folder.", metavar="DIR", default="./inference_results")] = None,
    output_filename: Annotated[
        str, option("Name of the output, .h5ad or .zarr.", metavar="NAME", default="scores.h5ad")
    ] = "scores.h5ad",
    batch_size: InferenceBatchSize = None,
    gene_col_name: GeneColName = None,
    gene_map: GeneMap = None,
    layer: Layer = None,
    modality: Modality = None,
    use_raw: UseRawOption = None,
    recover_counts: RecoverCounts = None,
    duplicate_genes: DuplicateGenes = None,
    remove_duplicate_genes: RemoveDuplicateGenes = None,
    make_names_unique: MakeNamesUnique = None,
    precision: Precision = None,
    device: Device = None,
    num_gpus: NumGpus = None,
    num_nodes: NumNodes = None,
    n_data_workers: NDataWorkers = None,
    allow_external_links: AllowExternalLinks = None,
    resume: Resume = False,
    config_override: ConfigOverride = None,
    debug: Debug = False,
) -> None:
    """Score how likely the model finds the genes and counts of cells.

    The output is one file or store with gene_nll, count_nll and perplexity in obs, or, with --per-gene, one row per
    gene.
    """
    options: dict[str, object] = {
        **input_settings(
            *(gene_col_name, gene_map, layer, modality, use_raw, recover_counts),
            *(duplicate_genes, remove_duplicate_genes, allow_external_links),
        ),
        **run_settings(
            *(output_path, output_filename, batch_size, precision, device),
            *(make_names_unique, num_gpus, num_nodes, resume),
        ),
        "model.data_config.n_data_workers": n_data_workers,
    }
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable("--resume"):
        from transcriptformer.checkpoint.published import load_config
        from transcriptformer.generation.score import describe, run

        config = load_config(checkpoint_path, options, config_override or [])
        with CountProgress("cells", "scoring") as progress:
            output = run(files, checkpoint_path, config, orders, per_gene, seed, progress.update)
        if output is not None:
            say(f"{describe(output)} in {output}")
