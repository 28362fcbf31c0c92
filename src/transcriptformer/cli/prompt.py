"""`transcriptformer prompt`: ask which genes come next."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from transcriptformer.cli.options import (
    ConfigOverride,
    Debug,
    Device,
    GeneMap,
    Precision,
    batch_size_setting,
    option,
)

if TYPE_CHECKING:
    import anndata

MAX_ROWS = 10
"""Maximum number of prompts, groups or sources whose genes are printed."""


def prompt(
    checkpoint_path: Annotated[Path, option("Checkpoint folder.", metavar="DIR")],
    gene: Annotated[
        list[str] | None, option("Gene of the prompt, in order; count 1 by default.", metavar="GENE[=COUNT]")
    ] = None,
    prompts: Annotated[Path | None, option("Table of prompts with a column genes.", metavar="FILE")] = None,
    data_file: Annotated[str | None, option("File with raw counts, whose cells are prompts.", metavar="FILE")] = None,
    groupby: Annotated[str | None, option("Column of obs; average over its cells.", metavar="COLUMN")] = None,
    cells_per_group: Annotated[
        int | None, option("Maximum cells per group, sampled.", metavar="INT", default=100, min=1)
    ] = None,
    candidates: Annotated[Path | None, option("Genes to choose among, one a line.", metavar="FILE")] = None,
    sources: Annotated[Path | None, option("Genes whose effect to measure, one a line.", metavar="FILE")] = None,
    targets: Annotated[
        Path | None, option("Genes to measure the effect on.", metavar="FILE", default="all genes")
    ] = None,
    null: Annotated[int, option("Random sources to compare each source with.", metavar="INT", default=0, min=0)] = 0,
    assay: Annotated[str | None, option("Assay of the prompts.", metavar="NAME", default="unknown")] = None,
    seed: Annotated[int, option("Seed of sampled cells and random sources.", metavar="INT", default=0, min=0)] = 0,
    top: Annotated[int, option("Genes to print per row.", metavar="INT", default=10, min=0)] = 10,
    output_path: Annotated[Path | None, option("Write all numbers, to .h5ad or .zarr.", metavar="FILE")] = None,
    plot: Annotated[Path | None, option("Draw a clustered heatmap of PMI.", metavar="FILE")] = None,
    gene_map: GeneMap = None,
    batch_size: Annotated[str | None, option("Maximum prompts per batch.", metavar="INT|auto", default="auto")] = None,
    precision: Precision = None,
    device: Device = None,
    config_override: ConfigOverride = None,
    debug: Debug = False,
) -> None:
    """Ask which genes come next after genes with counts, or after cells.

    With --sources, measure how each gene changes the probability of others (PMI).
    """
    options: dict[str, object] = {
        "model.data_config.gene_map": gene_map,
        "model.inference_config.batch_size": batch_size_setting(batch_size),
        "model.inference_config.precision": precision,
        "model.inference_config.device": device,
    }
    from transcriptformer.cli.reporting import CountProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable():
        from transcriptformer.checkpoint.load import load_checkpoint
        from transcriptformer.checkpoint.published import load_config
        from transcriptformer.generation.question import Question, Results, answer_question
        from transcriptformer.runtime.memory import keep_freed_memory

        question = Question(
            gene=gene or [],
            prompts=prompts,
            data_file=data_file,
            groupby=groupby,
            cells_per_group=cells_per_group,
            candidates=candidates,
            sources=sources,
            targets=targets,
            null=null,
            assay=assay,
            seed=seed,
        )
        results = Results(output_path, plot)
        results.check(question)
        checkpoint = load_checkpoint(checkpoint_path, load_config(checkpoint_path, options, config_override or []))
        if checkpoint.device.type == "cpu":
            keep_freed_memory()
        with CountProgress("sources" if sources else "prompts", "asking") as progress:
            answer = answer_question(question, checkpoint, progress.update)
        written = results.write(answer)
        if top:
            _print_top(answer, top)
        for line in written:
            say(line)


def _print_top(answer: "anndata.AnnData", top: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from transcriptformer.cli.reporting import printable, say, show
    from transcriptformer.generation.top import top_genes

    for ranking in top_genes(answer[:MAX_ROWS], top):
        table = Table(title=Text(printable(ranking.title)), title_justify="left")
        for name in ranking.columns:
            table.add_column(name, justify="left" if name in ("gene", "symbol") else "right")
        for row in ranking.rows:
            table.add_row(*(Text(printable(value)) for value in row))
        show(table)
    if answer.n_obs > MAX_ROWS:
        say(f"and {answer.n_obs - MAX_ROWS} more; --output-path writes all")
