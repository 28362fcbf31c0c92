"""What `transcriptformer prompt` is asked, and its answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.store import find_file, find_files
from transcriptformer.errors import UsageError
from transcriptformer.generation.cells import CELLS_PER_GROUP, CellGroup, read_groups
from transcriptformer.generation.groups import ask_groups
from transcriptformer.generation.heatmap import check_size, draw
from transcriptformer.generation.lists import read_genes, read_prompts
from transcriptformer.generation.next_genes import ask, make_answers
from transcriptformer.generation.null import check_null
from transcriptformer.generation.picture import check_picture
from transcriptformer.generation.pmi import gene_context, longest_context, make_sources, make_targets, pmi_in_groups
from transcriptformer.generation.prompts import aux_tokens, make_prompts, parse_gene_count, require_gene_head
from transcriptformer.runs.output import write_anndata
from transcriptformer.runs.recording import OnProgress
from transcriptformer.storage.atomic import check_writable, refuse_overwriting


@dataclass(frozen=True)
class Question:
    """Options of the command that say what is asked; named like them."""

    gene: Sequence[str] = ()
    prompts: Path | None = None
    data_file: str | None = None
    groupby: str | None = None
    cells_per_group: int | None = None
    candidates: Path | None = None
    sources: Path | None = None
    targets: Path | None = None
    null: int = 0
    assay: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = {option for option, value in self._options().items() if value}
        if not given & {"--gene", "--prompts", "--data-file", "--sources"}:
            raise UsageError("nothing to ask: give --gene, --prompts, --data-file or --sources")
        for one, other in (
            ("--gene", "--prompts"),
            ("--gene", "--data-file"),
            ("--prompts", "--data-file"),
            ("--prompts", "--sources"),
            ("--candidates", "--sources"),
            ("--assay", "--data-file"),
        ):
            if {one, other} <= given:
                raise UsageError(f"{other}: cannot be combined with {one}")
        for option, needed in (
            ("--groupby", "--data-file"),
            ("--cells-per-group", "--data-file"),
            ("--targets", "--sources"),
            ("--null", "--sources"),
        ):
            if option in given and needed not in given:
                raise UsageError(f"{option}: requires {needed}")
        check_null(self.null, "--null")

    @property
    def inputs(self) -> list[str | Path]:
        """Files that are read."""
        lists = [path for path in (self.prompts, self.candidates, self.sources, self.targets) if path is not None]
        return [*lists, *([] if self.data_file is None else find_files(self.data_file))]

    def max_shape(self) -> tuple[float, float]:
        """Return the maximum number of rows and genes of the answer, as far as known before the cells are read.

        Raises
        ------
        UsageError
            If a list or table cannot be read.
        """
        groups = 1 if self.groupby is None else math.inf
        genes = math.inf if self.targets is None else len(read_genes(self.targets, "--targets"))
        if self.sources is not None:
            return len(read_genes(self.sources, "--sources")) * groups, genes
        return groups if self.prompts is None else len(read_prompts(self.prompts, "--prompts").prompts), genes

    def _options(self) -> dict[str, object]:
        return {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Results:
    """Files to write an answer to."""

    output_path: Path | None = None
    plot: Path | None = None

    def check(self, question: Question) -> None:
        """Raise TranscriptFormerError if one cannot be written, is also an input, or cannot hold the answer."""
        if self.output_path is not None:
            if self.output_path.suffix not in (".h5ad", ".zarr"):
                raise UsageError(f"--output-path {self.output_path}: must end in .h5ad or .zarr")
            refuse_overwriting(self.output_path, question.inputs)
            check_writable(self.output_path)
        if self.plot is not None:
            check_picture(self.plot)
            check_size(*question.max_shape())
            refuse_overwriting(self.plot, question.inputs, "--plot")

    def write(self, answer: anndata.AnnData) -> list[str]:
        """Write the files; return a line about each."""
        lines = []
        if self.output_path is not None:  # first: a picture may fail, and can be drawn from it later
            write_anndata(answer, self.output_path)
            layers = "".join(f", layers['{name}']" for name in answer.layers)
            lines.append(f"{answer.n_obs} × {answer.n_vars}: X{layers} in {self.output_path}")
        if self.plot is not None:
            draw(answer, self.plot)
            lines.append(f"heatmap of PMI in {self.plot}")
        return lines


def answer_question(
    question: Question, checkpoint: Checkpoint, on_progress: OnProgress | None = None
) -> anndata.AnnData:
    """Answer a question: prompts × genes, groups × genes, or sources × targets.

    Raises
    ------
    TranscriptFormerError
        If a file or gene of the question is invalid, or the checkpoint predicts no genes.
    """
    require_gene_head(checkpoint)
    if question.sources is not None:
        return _pmi(question, question.sources, checkpoint, on_progress)
    candidates = None if question.candidates is None else read_genes(question.candidates, "--candidates")
    answers = make_answers(candidates, checkpoint, f"--candidates {question.candidates}")
    if question.data_file is not None:
        return ask_groups(checkpoint, _groups(question, question.data_file, checkpoint), answers, on_progress)
    if question.prompts is not None:
        option = f"--prompts {question.prompts}"
        table = read_prompts(question.prompts, "--prompts")
        if question.assay is not None and "assay" in table.aux:
            raise UsageError("--assay: the table of --prompts has a column assay; give one of them")
        made, aux, names = make_prompts(table.prompts, checkpoint, option), table.aux, table.names
    else:
        pairs = [parse_gene_count(gene, "--gene") for gene in question.gene]
        made, aux, names = make_prompts([pairs], checkpoint, "--gene"), {}, ["prompt"]
    tokens = aux_tokens(checkpoint, len(made), {"assay": question.assay, **aux})
    return ask(checkpoint, made, tokens, answers, names, on_progress)


def _pmi(question: Question, sources: Path, checkpoint: Checkpoint, on_progress: OnProgress | None) -> anndata.AnnData:
    option = f"--sources {sources}"
    pairs = [parse_gene_count(gene, option) for gene in read_genes(sources, "--sources")]
    made = make_sources(pairs, checkpoint, option)
    targets = None if question.targets is None else read_genes(question.targets, "--targets")
    answers = make_targets(targets, checkpoint, f"--targets {question.targets}")
    if question.data_file is not None:
        groups = _groups(question, question.data_file, checkpoint, longest_context(checkpoint))
    else:
        genes = [parse_gene_count(gene, "--gene") for gene in question.gene]
        groups = [gene_context(checkpoint, genes, {"assay": question.assay}, "--gene")]
    return pmi_in_groups(checkpoint, made, answers, groups, question.null, question.seed, on_progress)


def _groups(question: Question, name: str, checkpoint: Checkpoint, max_genes: int | None = None) -> list[CellGroup]:
    per_group = CELLS_PER_GROUP if question.cells_per_group is None else question.cells_per_group
    return read_groups(find_file(name), checkpoint, question.groupby, per_group, question.seed, max_genes)
