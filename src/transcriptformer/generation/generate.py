"""New cells from the model: from nothing, from genes, or from a part of each cell of a file."""

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from transcriptformer.checkpoint.load import Checkpoint
from transcriptformer.data.reader import CellReader
from transcriptformer.data.species import species_of
from transcriptformer.errors import DataError, UsageError
from transcriptformer.generation.gene_names import gene_tokens
from transcriptformer.generation.prompts import GeneCount, Prompt, aux_tokens, make_prompts, require_gene_head
from transcriptformer.generation.real_cells import Cells, Source, open_cells, read_all_cells, require_counts
from transcriptformer.generation.sample import NewCells, Sampler, Sampling
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.runs.batch_size import bytes_per_token
from transcriptformer.runs.output import PROVENANCE_KEY, provenance_of
from transcriptformer.runtime.memory import SHARE_OF_FREE_MEMORY, Halving, free_memory

logger = logging.getLogger(__name__)

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
    keep: float = 0.5,
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
        Share of each cell's genes that is kept.
    like
        Cells, as a path or AnnData, whose number of genes, total count and metadata the new ones take.
    n_genes, total_counts
        Number of genes and total count of each cell; None: as in `data` or `like`.
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
    plan = make_plan(wanted, model, seed)
    check_plan(plan.cells, mask, network.config.seq_len)
    drawn = draw_all(plan.cells, model, network, sampling, mask, on_progress)
    settings = {
        **{name: getattr(sampling, name) for name in ("temperature", "top_p", "count_rounds", "seed")},
        **({"keep": keep} if data is not None else {}),
        "renormalized_over": "genes of the vocabulary that the cell lacks" if candidates is None else "candidates",
    }
    if candidates is not None:
        settings["candidates"] = model.gene_vocab.names()[mask].astype(str)
    result = to_anndata(plan, drawn, model)
    sources, inferred = ([], []) if plan.reader is None else ([plan.source], [plan.reader.source.describe()])
    result.uns[PROVENANCE_KEY] = provenance_of(sources, model, model.weights_sha256(), inferred)
    result.uns[GENERATION_KEY] = settings
    return result


class Wanted(NamedTuple):
    """Arguments of `generate` that say which cells are wanted."""

    n_cells: int | None
    prompt: Sequence[GeneCount]
    data: Source | None
    keep: float
    like: Source | None
    n_genes: int | None
    total_counts: float | None
    metadata: Mapping[str, str | None]

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise UsageError for arguments that are out of range or do not go together."""
        require_counts(checkpoint)
        for name, value in (("n_cells (--n-cells)", self.n_cells), ("n_genes (--n-genes)", self.n_genes)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: must be at least 1, not {value}")
        if self.total_counts is not None and not 1 <= self.total_counts < np.inf:
            raise UsageError(f"total_counts (--total-counts): must be at least 1, not {self.total_counts}")
        if not 0 < self.keep < 1:
            raise UsageError(f"keep (--keep): must be between 0 and 1, not {self.keep}")
        if self.data is not None and (self.like is not None or self.prompt or self.n_cells is not None):
            raise UsageError(
                "data (--data-file): gives one new cell per cell, which begins with a part of it; leave out n_cells "
                "(--n-cells), prompt (--gene) and like (--like)"
            )
        if self.data is None and self.like is None:
            missing = [
                option
                for option, value in (
                    ("n_cells (--n-cells)", self.n_cells),
                    ("n_genes (--n-genes)", self.n_genes),
                    ("total_counts (--total-counts)", self.total_counts),
                )
                if value is None
            ]
            if missing:
                raise UsageError(f"{', '.join(missing)}: missing; give them, or cells to imitate with like (--like)")


class Plan(NamedTuple):
    """The cells to draw, with their names, the text of their prompts, and the source they imitate or begin with."""

    cells: NewCells
    names: pd.Index
    prompts: list[str]
    source: Source | None
    reader: CellReader | None


def make_plan(wanted: Wanted, checkpoint: Checkpoint, seed: int) -> Plan:
    """Decide where each cell begins, its number of genes, total count and metadata.

    Raises
    ------
    TranscriptFormerError
        If genes or a source cannot be used.
    """
    given = make_prompts([wanted.prompt], checkpoint, "prompt (--gene)")[0]
    source = wanted.data if wanted.data is not None else wanted.like
    reader, cells = None, None
    if source is not None:
        reader = open_cells(source, checkpoint, seed)
        try:
            cells = read_all_cells(reader)
        finally:
            reader.source.close()
    names, prompts, text = None, None, _text_of(given, checkpoint)
    if cells is not None and wanted.data is not None:
        n, names, prompts = len(cells.names), cells.names, _parts_of(cells, wanted.keep)
        chosen, text = np.arange(n), f"{wanted.keep:g} of the cell"
    elif cells is not None:
        chosen = _choose_like(cells, wanted.n_cells, seed)
        n = len(chosen)
    else:
        n = wanted.n_cells or 0
    lengths, totals, aux = np.zeros(n, np.int64), np.zeros(n), aux_tokens(checkpoint, n, wanted.metadata)
    if cells is not None:
        lengths, totals = cells.tokens.lengths[chosen].astype(np.int64), cells.tokens.totals()[chosen]
        is_given = [wanted.metadata.get(column) is not None for column in checkpoint.aux_vocabs]
        aux = np.where(is_given, aux, cells.aux_tokens[chosen])
    if wanted.n_genes is not None:
        lengths = np.full(n, wanted.n_genes)
    if wanted.total_counts is not None:
        totals = np.full(n, float(wanted.total_counts))
    new = NewCells(np.arange(n), prompts if prompts is not None else [given] * n, aux, lengths, totals)
    names = names if names is not None else pd.Index([f"generated_{i}" for i in range(n)])
    return Plan(new, names, [text] * n, source, reader)


def _parts_of(cells: Cells, keep: float) -> list[Prompt]:
    """Return a part of each cell, which is random if its genes are shuffled."""
    genes, counts, offsets = cells.tokens
    n_kept = np.round(keep * cells.tokens.lengths).astype(int)
    return [
        Prompt(genes[start : start + n].astype(np.int64), counts[start : start + n])
        for start, n in zip(offsets[:-1], n_kept, strict=True)
    ]


def _choose_like(cells: Cells, n_cells: int | None, seed: int) -> np.ndarray:
    """Return the index of the cell that each new cell imitates: every one, or `n_cells` random ones."""
    has_genes = np.flatnonzero(cells.tokens.lengths)
    if not len(has_genes):
        raise DataError("like (--like): none of its cells expresses a gene of the vocabulary")
    if n_cells is None:
        return has_genes
    return np.array([np.random.default_rng([seed, row, 2**32]).choice(has_genes) for row in range(n_cells)])


def _text_of(prompt: Prompt, checkpoint: Checkpoint) -> str:
    genes = checkpoint.gene_vocab.names()[prompt.tokens]
    return " ".join(f"{gene}={count:g}" for gene, count in zip(genes, prompt.counts, strict=True))


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


def check_plan(cells: NewCells, candidates: np.ndarray, seq_len: int) -> None:
    """Raise UsageError if a cell cannot have as many genes as it should."""
    for row, prompt, n_genes, total in zip(cells.rows, cells.prompts, cells.n_genes, cells.totals, strict=True):
        where = "n_genes (--n-genes)" if len(set(cells.n_genes)) == 1 else f"cell {row + 1}"
        n_available = int(candidates.sum() - candidates[prompt.tokens].sum()) + len(prompt.tokens)
        if n_genes > seq_len:
            raise UsageError(f"{where}: {n_genes} genes; the model takes at most {seq_len}")
        if n_genes > n_available:
            raise UsageError(f"{where}: {n_genes} genes; there are only {n_available} candidates, with those given")
        if n_genes < len(prompt.tokens):
            raise UsageError(f"{where}: {n_genes} genes; its prompt already has {len(prompt.tokens)}")
        if total < n_genes:
            raise UsageError(f"total_counts (--total-counts): {total:g} for {n_genes} genes, each of at least one")


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
    network.gene_embeddings.keep_embeddings()
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
        "prompt": plan.prompts,
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
