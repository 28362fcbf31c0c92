"""The order of the command `generate`: its arguments checked, and passed to `generate` or `impute`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.errors import UsageError
from transcriptformer.generation.generate import generate
from transcriptformer.generation.impute import impute
from transcriptformer.generation.lists import read_genes
from transcriptformer.generation.picture import check_picture
from transcriptformer.generation.prompts import parse_gene_count
from transcriptformer.generation.real_cells import count_cells
from transcriptformer.generation.sample import Sampling
from transcriptformer.runs.recording import OnProgress
from transcriptformer.storage.atomic import check_writable, refuse_overwriting

_WITH_IMPUTE = ("seed", "assay")
"""Arguments that apply to imputation as well."""

_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}


class Order(NamedTuple):
    """Options of the command.

    Attributes
    ----------
    genes
        GENE=COUNT or GENE, that new cells begin with.
    data_file
        File with cells.
    impute
        Genes to impute: a file, names separated by commas, or all.
    output, plot
        Files to write.
    given
        Other arguments of `generate`.
    """

    genes: Sequence[str]
    data_file: str | None
    impute: str | None
    output: Path
    plot: Path | None
    given: Mapping[str, Any]

    def fill(self, checkpoint: Checkpoint, on_progress: OnProgress) -> anndata.AnnData:
        """Generate or impute cells.

        Raises
        ------
        TranscriptFormerError
            If an argument or a file cannot be used.
        """
        if self.impute is not None:
            assert self.data_file is not None
            queried = self.impute if self.impute == "all" else _names(self.impute)
            common = {name: self.given[name] for name in _WITH_IMPUTE}
            return impute(self.data_file, checkpoint, queried, **common, on_progress=on_progress)
        if self.plot is not None:
            self._check_umap(checkpoint)
        arguments = dict(self.given)
        candidates = arguments.get("candidates")
        if candidates is not None and Path(candidates).is_file():
            arguments["candidates"] = read_genes(Path(candidates), "--candidates")
        prompt = [parse_gene_count(gene, "--gene") for gene in self.genes]
        return generate(checkpoint, prompt=prompt, data=self.data_file, **arguments, on_progress=on_progress)

    @property
    def inputs(self) -> list[str]:
        """Files that are read; lists of genes may be names instead, which are no files."""
        names = (self.data_file, self.impute, self.given.get("like"), self.given.get("candidates"))
        return [str(name) for name in names if name is not None]

    @property
    def real_cells(self) -> str | None:
        """File with cells to compare generated ones with."""
        return self.given.get("like") or self.data_file

    def _check_umap(self, checkpoint: Checkpoint) -> None:
        """Raise UsageError if there will be too few cells, even if the filters keep all."""
        from transcriptformer.generation.umap import check_number  # imports scanpy, which takes seconds

        assert self.real_cells is not None
        n_real = count_cells(self.real_cells, checkpoint, "--like" if "like" in self.given else "--data-file")
        check_number(n_real + self.given.get("n_cells", n_real))

    def draw_umap(self, cells: anndata.AnnData, checkpoint: Checkpoint) -> None:
        """Plot generated cells with real ones."""
        from transcriptformer.generation.umap import draw_umap

        assert self.real_cells is not None
        assert self.plot is not None
        draw_umap(cells, self.real_cells, checkpoint, self.given["seed"], self.plot)


def check_order(order: Order) -> None:
    """Check what can be checked without the model.

    Raises
    ------
    UsageError
        If options are out of range or do not go together, or the output cannot be written.
    """
    given = order.given
    Sampling(given["temperature"], given["top_p"], given.get("count_rounds", 1), given["seed"])
    if order.impute is not None:
        if order.data_file is None:
            raise UsageError("--impute: give the cells with --data-file")
        drawing = [name for name, value in given.items() if name not in _WITH_IMPUTE and value != _DEFAULTS.get(name)]
        options = [f"--{name.replace('_', '-')}" for name in drawing] + ["--gene"] * bool(order.genes)
        if order.plot is not None:
            options.append("--plot")
        if options:
            raise UsageError(f"--impute: draws nothing; leave out {', '.join(options)}")
    elif "keep" in given and order.data_file is None:
        raise UsageError("--keep: applies to the cells of --data-file")
    if order.plot is not None:
        if order.real_cells is None:
            raise UsageError("--plot: give real cells with --like or --data-file")
        refuse_overwriting(order.plot, order.inputs, "--plot")
        check_picture(order.plot)
    refuse_overwriting(order.output, order.inputs, "--output-filename")
    check_writable(order.output)


def _names(text: str) -> list[str]:
    """Return the genes of a file, or those separated by commas."""
    if Path(text).is_file():
        return read_genes(Path(text), "--impute")
    return [name.strip() for name in text.split(",") if name.strip()]
