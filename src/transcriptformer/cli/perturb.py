"""`transcriptformer perturb`: in-silico perturbation of cells."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    PretrainedEmbedding,
    RecoverCounts,
    RemoveDuplicateGenes,
    Resume,
    UseRawOption,
    input_settings,
    option,
    paths_setting,
    run_settings,
)

if TYPE_CHECKING:
    import pandas as pd

MAX_ROWS = 20
"""Maximum number of perturbations that are printed."""


def perturb(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files with raw counts.")],
    checkpoint_path: Annotated[Path, option("Checkpoint folder.", metavar="DIR")],
    knock_out: Annotated[list[str] | None, option("Gene to remove; repeatable, each alone.", metavar="GENE")] = None,
    knock_out_each: Annotated[Path | None, option("Genes to remove, each alone, one a line.", metavar="FILE")] = None,
    set_counts: Annotated[
        list[str] | None, option("Gene and its new count; repeatable, each alone.", "--set", metavar="GENE=COUNT")
    ] = None,
    at: Annotated[str, option("Where --set adds absent genes.", metavar="end|start", default="end")] = "end",
    groupby: Annotated[str | None, option("Column of obs; summarize per value.", metavar="COLUMN")] = None,
    null: Annotated[int, option("Genes of like expression to compare each with.", metavar="INT", default=0, min=0)] = 0,
    seed: Annotated[int, option("Seed of the null and of intervals.", metavar="INT", default=0)] = 0,
    output_path: Annotated[Path | None, option("Output folder.", metavar="DIR", default="./inference_results")] = None,
    output_filename: Annotated[
        str, option("Name of the output, .h5ad or .zarr.", metavar="NAME", default="perturbations.h5ad")
    ] = "perturbations.h5ad",
    plot: Annotated[Path | None, option("Draw the ranked effects.", metavar="FILE")] = None,
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
    pretrained_embedding: PretrainedEmbedding = None,
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
    """Measure how far removing genes, or setting their counts, moves the embeddings of cells.

    The output is one file or store with obsm cosine_shift (cells, perturbations), and a table of the effects in uns and
    as CSV beside it.
    """
    settings: dict[str, object] = {
        **input_settings(
            *(gene_col_name, gene_map, layer, modality, use_raw, recover_counts),
            *(duplicate_genes, remove_duplicate_genes, allow_external_links),
        ),
        **run_settings(
            *(output_path, output_filename, batch_size, precision, device),
            *(make_names_unique, num_gpus, num_nodes, resume),
        ),
        "model.data_config.n_data_workers": n_data_workers,
        "model.inference_config.pretrained_embedding": paths_setting(pretrained_embedding),
    }
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable("--resume"):
        from transcriptformer.checkpoint.published import load_config
        from transcriptformer.generation.perturb import Options, describe, read_table, run, table_path

        options = Options(knock_out or [], knock_out_each, set_counts or [], at, groupby, null, seed, plot)
        config = load_config(checkpoint_path, settings, config_override or [])
        with CountProgress("cells", "perturbing") as progress:
            output = run(files, checkpoint_path, config, options, progress.update)
        if output is not None:
            _print_largest(read_table(output))
            say(f"{describe(output)} in {output}; table in {table_path(output)}{f', plot in {plot}' if plot else ''}")


def _print_largest(table: "pd.DataFrame") -> None:
    from rich.table import Table
    from rich.text import Text

    from transcriptformer.cli.reporting import printable, say, show

    ranked = table.sort_values("mean", ascending=False, kind="stable").head(MAX_ROWS)
    shown = Table("perturbation", "group")
    for name in ("cells", "mean shift", "95 % interval", *(name for name in ("z", "p", "q") if name in table)):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in ranked.to_dict("records"):
        numbers = [f"{row[name]:.2g}" for name in ("z", "p", "q") if name in row]
        interval = f"{row['ci_low']:.2g} to {row['ci_high']:.2g}"
        cells = f"{row['n_expressing']} of {row['n_cells']}"
        texts = (row["perturbation"], row["group"], cells, f"{row['mean']:.2g}", interval, *numbers)
        shown.add_row(*(Text(printable(text)) for text in texts))
    show(shown)
    if len(table) > MAX_ROWS:
        say(f"and {len(table) - MAX_ROWS} more rows in the table")
