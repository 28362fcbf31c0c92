"""New cells from the model: from nothing, from genes, or from a part of each cell of a file."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.species import species_of
from transcriptformer.errors import DataError, UsageError
from transcriptformer.generation.gene_names import gene_tokens
from transcriptformer.generation.prompts import GeneCount, Prompt, aux_tokens, make_prompts, require_gene_head
from transcriptformer.generation.real_cells import Cells, RealCells, Source, opened_cells, require_counts
from transcriptformer.generation.sample import NewCells, Sampler, Sampling
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import bytes_per_token
from transcriptformer.runs.module import prepare_encoder
from transcriptformer.runs.output import PROVENANCE_KEY, provenance_of
from transcriptformer.runtime.memory import SHARE_OF_FREE_MEMORY, Halving, free_memory

GENERATION_KEY, ORDER_LAYER = "generation", "order"

MAX_CELLS = {"cpu": 64, "mps": 64, "cuda": 256}
"""Maximum number of cells that grow together by device type; more are hardly faster."""

OnProgress = Callable[[int, int], None]


class DrawnCell(NamedTuple):
    """A drawn cell: its row, genes in order, counts and the log-probability of the genes."""

    row: int
    genes: np.ndarray
    counts: np.ndarray
    log_likelihood: float


def generate(
    model: Checkpoint,
    n_cells: int | None = None,
    *,
    prompt: Sequence[GeneCount] = (),
    data: Source | None = None,
    keep: float | None = None,
    like: Source | None = None,
    n_genes: int | None = None,
    total_counts: float | None = None,
    assay: str | None = None,
    metadata: Mapping[str, str] | None = None,
    candidates: Sequence[str] | str | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    count_rounds: int = 1,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> anndata.AnnData:
    """Draw new cells from the model, gene by gene.

    Parameters
    ----------
    model
        Checkpoint returned by `load`.
    n_cells
        Number of cells. None: one per cell of `data` or `like`.
    prompt
        Genes, by id or symbol, that each cell begins with: names, or pairs of name and count.
    data
        Cells, as a path or AnnData, of which a random part of the genes is kept, and the rest drawn.
    keep
        Share of the genes of each cell of `data` that is kept; None: a half.
    like
        Cells, as a path or AnnData, whose number of genes, total count and metadata the new ones take.
    n_genes, total_counts
        Number of genes and total count of each cell; None: as in `data` or `like`. Models whose counts are no share of
        the total (`mu_link_fn` other than softmax) need no total count, and ignore it.
    assay, metadata
        Assay, and values of other metadata columns, of all new cells; None: as in `data` or `like`, else unknown.
    candidates
        Genes to draw from, or a species whose genes these are; None: the vocabulary.
    temperature, top_p, count_rounds, seed
        See `Sampling`.
    on_progress
        Called with the number of drawn genes and of genes to draw.

    Returns
    -------
    An AnnData (cells, genes of the vocabulary) with counts in `X`, CSR, and the position of each gene in its cell, from
    1, in `layers['order']`. `obs` holds the prompt, its number of genes, the number of genes, the total count that was
    asked for, the log-probability of the genes and the metadata. Settings are in `uns['generation']`.

    Raises
    ------
    TranscriptFormerError
        If an argument or the data cannot be used, or the model predicts no genes.
    """
    network = require_gene_head(model)
    sampling = Sampling(temperature, top_p, count_rounds, seed)
    wanted = Wanted(n_cells, prompt, data, keep, like, n_genes, total_counts, {"assay": assay, **(metadata or {})})
    wanted.check(model)
    mask = candidate_mask(candidates, model)
    plan = make_plan(wanted, model, network.max_genes, seed)
    check_plan(plan, wanted, mask, network.max_genes)
    drawn = draw_all(plan.cells, model, network, sampling, mask, on_progress)
    settings = {
        **{name: getattr(sampling, name) for name in ("temperature", "top_p", "count_rounds", "seed")},
        **({"keep": wanted.kept_share} if data is not None else {}),
        "renormalized_over": "genes of the vocabulary that the cell lacks" if candidates is None else "candidates",
    }
    if candidates is not None:
        settings["candidates"] = model.gene_vocab.names()[mask].astype(str)
    result = to_anndata(plan, drawn, model)
    sources = [] if wanted.source is None else [wanted.source]
    inferred = [] if plan.inferred is None else [plan.inferred]
    result.uns[PROVENANCE_KEY] = provenance_of(sources, model, model.weights_sha256(), inferred)
    result.uns[GENERATION_KEY] = settings
    return result


class Wanted(NamedTuple):
    """Arguments of `generate` that say which cells are wanted."""

    n_cells: int | None
    prompt: Sequence[GeneCount]
    data: Source | None
    keep: float | None
    like: Source | None
    n_genes: int | None
    total_counts: float | None
    metadata: Mapping[str, str | None]

    @property
    def source(self) -> Source | None:
        """Cells to begin with or to imitate."""
        return self.like if self.data is None else self.data

    @property
    def option(self) -> str:
        """Option that names the source."""
        return "--like" if self.data is None else "--data-file"

    @property
    def kept_share(self) -> float:
        """Share of the genes of each cell of `data` that is kept."""
        return 0.5 if self.keep is None else self.keep

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UsageError for arguments that are out of range or do not go together."""
        require_counts(checkpoint)
        for name, value in (("n_cells (--n-cells)", self.n_cells), ("n_genes (--n-genes)", self.n_genes)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, not {value}")
        if self.total_counts is not None and not 1 <= self.total_counts < np.inf:
            raise UsageError(f"total_counts (--total-counts): must be at least 1, not {self.total_counts}")
        if not 0 < self.kept_share < 1:
            raise UsageError(f"keep (--keep): must be between 0 and 1, not {self.keep}")
        if self.keep is not None and self.data is None:
            raise UsageError("keep (--keep): applies to the cells of data (--data-file)")
        if self.data is not None and (self.like is not None or self.prompt or self.n_cells is not None):
            raise UsageError(
                "data (--data-file): gives one new cell per cell, which begins with a part of it; leave out n_cells "
                "(--n-cells), prompt (--gene) and like (--like)"
            )
        if self.source is None:
            needed: dict[str, float | None] = {
                "n_cells (--n-cells)": self.n_cells,
                "n_genes (--n-genes)": self.n_genes,
            }
            if _has_totals(checkpoint):
                needed["total_counts (--total-counts)"] = self.total_counts
            missing = [option for option, value in needed.items() if value is None]
            if missing:
                raise UsageError(f"{', '.join(missing)}: missing; give them, or cells to imitate with like (--like)")

    def resize(self, cells: NewCells, checkpoint: Checkpoint) -> NewCells:
        """Return cells with the numbers of genes and total counts that are given; NaN for totals without effect."""
        n = len(cells.rows)
        if self.n_genes is not None:
            cells = cells._replace(n_genes=np.full(n, self.n_genes))
        if not _has_totals(checkpoint):
            return cells._replace(totals=np.full(n, np.nan))
        return cells if self.total_counts is None else cells._replace(totals=np.full(n, float(self.total_counts)))


def _has_totals(checkpoint: Checkpoint) -> bool:
    """Whether the model's counts are shares of a cell's total count."""
    return checkpoint.config.model.model_config.mu_link_fn == "softmax"


class Plan(NamedTuple):
    """The cells to draw, with their names and the text of their prompts.

    Attributes
    ----------
    inferred
        What was inferred about the source of the cells that they imitate or begin with; None without one.
    """

    cells: NewCells
    names: pd.Index
    prompt: str
    inferred: dict[str, str] | None = None


def make_plan(wanted: Wanted, checkpoint: Checkpoint, max_genes: int, seed: int) -> Plan:
    """Decide where each cell begins, its number of genes, total count and metadata.

    Raises
    ------
    TranscriptFormerError
        If genes or a source cannot be used.
    """
    given = make_prompts([wanted.prompt], checkpoint, "prompt (--gene)")[0]
    text = given.describe(checkpoint.gene_vocab.names())
    if wanted.source is None:
        n = wanted.n_cells or 0
        aux, n_genes, totals = aux_tokens(checkpoint, n, wanted.metadata), np.zeros(n, np.int64), np.full(n, np.nan)
        cells, names, inferred = NewCells(np.arange(n), [given] * n, aux, n_genes, totals), None, None
    else:
        arguments = wanted.source, checkpoint, seed, max_genes, wanted.metadata, wanted.option
        with opened_cells(*arguments) as real:
            inferred = real.reader.source.describe()
            if wanted.data is not None:
                cells, names = _imitate(real, np.flatnonzero(real.survey.kept), wanted.kept_share)
                text = f"{wanted.kept_share:g} of the cell"
            else:
                cells, names = _imitate(real, _choose_like(real, wanted.n_cells, seed), 0)[0], None
                cells = cells._replace(prompts=[given] * len(cells.rows))
    if names is None:
        names = pd.Index([f"generated_{i}" for i in range(len(cells.rows))])
    return Plan(wanted.resize(cells, checkpoint), names, text, inferred)


def _imitate(real: RealCells, chosen: np.ndarray, keep: float) -> tuple[NewCells, pd.Index]:
    """Return new cells that take numbers of genes, totals and metadata of chosen cells, and the names of these.

    Each begins with the share `keep` of the genes, which is random if the genes are shuffled.
    """
    distinct, place = np.unique(chosen, return_inverse=True)
    names, prompts, arrays = list[str](), list[Prompt](), list[tuple[np.ndarray, ...]]()
    for cells in real.blocks(distinct):
        names += cells.names.tolist()
        prompts += _parts_of(cells, keep)
        arrays.append((cells.aux_tokens, cells.tokens.lengths.astype(np.int64), cells.tokens.totals()))
    joined = NewCells(np.arange(len(names)), prompts, *map(np.concatenate, zip(*arrays, strict=True)))
    return joined.take(place)._replace(rows=np.arange(len(place))), pd.Index(names, dtype=object)[place]


def _parts_of(cells: Cells, keep: float) -> list[Prompt]:
    """Return the first genes of each cell, a share of them."""
    genes, counts, offsets = cells.tokens
    n_kept = np.round(keep * cells.tokens.lengths).astype(int)
    return [
        Prompt(genes[start : start + n].astype(np.int64), counts[start : start + n].copy())
        for start, n in zip(offsets[:-1], n_kept, strict=True)
    ]


def _choose_like(real: RealCells, n_cells: int | None, seed: int) -> np.ndarray:
    """Return the index of the cell that each new cell imitates: every one, or `n_cells` random ones."""
    has_genes = np.flatnonzero(real.survey.kept & (real.survey.lengths > 0))
    if not len(has_genes):
        raise DataError("like (--like): none of its cells expresses a gene of the vocabulary")
    if n_cells is None:
        return has_genes
    return np.array([np.random.default_rng([seed, row, 2**32]).choice(has_genes) for row in range(n_cells)])


def candidate_mask(candidates: Sequence[str] | str | None, checkpoint: Checkpoint) -> np.ndarray:
    """Return the mask of the tokens to draw from (V,); never special tokens.

    Raises
    ------
    UsageError
        If a gene is unknown, or the vocabulary has no gene of the species.
    """
    vocab = checkpoint.gene_vocab
    mask = np.arange(len(vocab)) >= len(vocab.special_tokens)
    if candidates is None:
        return mask
    if isinstance(candidates, str):
        species = candidates.strip().lower().replace(" ", "_")
        of_species = np.array([species_of(gene) == species for gene in vocab.genes])
        if not of_species.any():
            known = sorted({str(found) for gene in vocab.genes if (found := species_of(gene))})
            raise UsageError(
                f"candidates (--candidates): {candidates!r} is neither a file nor a species of the vocabulary; its "
                f"species: {', '.join(known) or 'none known'}"
            )
        return np.concatenate([np.zeros(len(vocab.special_tokens), bool), of_species])
    tokens = gene_tokens(list(candidates), checkpoint, "candidates (--candidates)")
    return mask & np.isin(np.arange(len(vocab)), tokens)


def check_plan(plan: Plan, wanted: Wanted, candidates: np.ndarray, max_genes: int) -> None:
    """Raise UsageError if a cell cannot have as many genes as it should."""
    cells, n = plan.cells, len(plan.cells.rows)
    given = np.concatenate([prompt.tokens for prompt in cells.prompts])
    is_other = ~candidates[given]  # candidates or not, the genes of a prompt are there
    n_available = candidates.sum() + np.bincount(np.repeat(np.arange(n), cells.n_given)[is_other], minlength=n)
    source = f"{'data' if wanted.data is not None else 'like'} ({wanted.option}), cell"
    for is_wrong, argument, limits, problem in (
        (cells.n_genes > max_genes, "n_genes", np.full(n, max_genes), "the model takes at most {:g}"),
        (cells.n_genes > n_available, "n_genes", n_available, "there are only {:g} candidates, with those given"),
        (cells.n_genes < cells.n_given, "n_genes", cells.n_given, "its prompt already has {:g}"),
        (cells.totals < cells.n_genes, "total_counts", cells.totals, "the total count is {:g}, less than one of each"),
    ):
        if is_wrong.any():
            i = int(is_wrong.argmax())
            option = f"{argument} (--{argument.replace('_', '-')})"
            where = f"{source} {plan.names[i]}" if getattr(wanted, argument) is None else option
            raise UsageError(f"{where}: {cells.n_genes[i]} genes; {problem.format(limits[i])}")


def draw_all(
    cells: NewCells,
    checkpoint: Checkpoint,
    network: TranscriptFormer,
    sampling: Sampling,
    candidates: np.ndarray,
    on_progress: OnProgress | None = None,
) -> list[DrawnCell]:
    """Draw all cells, in batches of similar length; the result is in order."""
    network.to(checkpoint.device)
    prepare_encoder(network, checkpoint.config.model.inference_config, cells.n_genes, checkpoint.device)
    n_total, n_before, n_drawn = int((cells.n_genes - cells.n_given).sum()), 0, 0

    def report(n_genes: int) -> None:
        nonlocal n_drawn
        n_drawn += n_genes
        if on_progress is not None:
            on_progress(n_before + n_drawn, n_total)

    def draw(batch: NewCells) -> list[DrawnCell]:
        nonlocal n_before, n_drawn
        n_drawn = 0  # again, for a batch that has run out of memory
        report(0)
        drawn = sampler(batch)
        n_before, n_drawn = n_before + n_drawn, 0
        arrays = (values.cpu().numpy() for values in drawn)
        parts = zip(batch.rows, batch.n_genes, *arrays, strict=True)
        return [DrawnCell(int(row), genes[:n], counts[:n], float(llh)) for row, n, genes, counts, llh in parts]

    sampler = Sampler(network, sampling, candidates, checkpoint.config.model.data_config.clip_counts, report)
    advice = "use another device, fewer genes or --precision 16-mixed"
    draw_within_memory = Halving(draw, _size, _split, operator.add, "cell", advice)
    order, start, found = np.argsort(-cells.n_genes, kind="stable"), 0, list[DrawnCell]()
    while start < len(order):
        size = cells_per_batch(checkpoint, int(cells.n_genes[order[start]]))
        found += draw_within_memory(cells.take(order[start : start + size]))
        start += size
    return sorted(found)


def _size(batch: NewCells) -> tuple[int, int]:
    return len(batch.rows), len(batch.rows) * int(batch.n_genes.max())


def _split(batch: NewCells) -> tuple[NewCells, NewCells]:
    first, second = np.array_split(np.arange(len(batch.rows)), 2)
    return batch.take(first), batch.take(second)


def cells_per_batch(checkpoint: Checkpoint, n_genes: int) -> int:
    """Return the number of cells of `n_genes` genes to draw at once; `auto` uses the currently free memory."""
    inference, config = checkpoint.config.model.inference_config, checkpoint.config.model.model_config
    if isinstance(inference.batch_size, int):
        return inference.batch_size
    size = next(checkpoint.model.parameters()).element_size()
    per_gene = 2 * config.num_layers * config.embed_dim * size + bytes_per_token(checkpoint)
    per_cell = n_genes * per_gene + 8 * 4 * len(checkpoint.gene_vocab)
    available = SHARE_OF_FREE_MEMORY * (free_memory(checkpoint.device) - checkpoint.weights_bytes)
    return int(np.clip(available / per_cell, 1, MAX_CELLS[checkpoint.device.type]))


def to_anndata(plan: Plan, drawn: Sequence[DrawnCell], checkpoint: Checkpoint) -> anndata.AnnData:
    """Combine drawn cells into an AnnData."""
    n_special, genes = len(checkpoint.gene_vocab.special_tokens), list(checkpoint.gene_vocab.genes)
    lengths = [len(cell.genes) for cell in drawn]
    rows = np.repeat(np.arange(len(drawn)), lengths)
    columns = np.concatenate([cell.genes for cell in drawn]) - n_special
    counts = np.concatenate([cell.counts for cell in drawn])
    order = np.concatenate([np.arange(1, n + 1, dtype=np.float32) for n in lengths])
    shape = len(drawn), len(genes)
    obs: dict[str, Any] = {
        "prompt": [plan.prompt] * len(drawn),
        "n_prompt_genes": plan.cells.n_given,
        "n_genes": lengths,
        "total_counts_wanted": plan.cells.totals,
        "log_likelihood": [cell.log_likelihood for cell in drawn],
    }
    for i, (column, vocab) in enumerate(checkpoint.aux_vocabs.items()):
        name_of = {token: name for name, token in vocab.ids.items()}
        obs[column] = pd.Categorical([name_of.get(token, "unknown") for token in plan.cells.aux_tokens[:, i]])
    with anndata.settings.override(check_uniqueness=False):  # cells of a file may share a name
        return anndata.AnnData(
            sparse.csr_matrix((counts, (rows, columns)), shape),
            obs=pd.DataFrame(obs, index=plan.names),
            var=pd.DataFrame(index=pd.Index(genes)),
            layers={ORDER_LAYER: sparse.csr_matrix((order, (rows, columns)), shape)},
        )
