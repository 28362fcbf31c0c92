"""Sources of cells, in files, stores or AnnData objects: counts in blocks, gene ids and metadata."""

import hashlib
import json
import logging
from functools import partial

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from transcriptformer.config import MAX_INT, DataConfig
from transcriptformer.data.anndata_contents import contents_of_adata
from transcriptformer.data.counts import LoadedWhole, Matrix, loaded, to_canonical_csr
from transcriptformer.data.formats import open_contents
from transcriptformer.data.gene_map import load_symbol_maps
from transcriptformer.data.genes import INDEX, Genes, find_genes
from transcriptformer.data.places import RAW, Choice, Contents, Place, Recovery, choose_place, recoverable_place
from transcriptformer.data.species import looks_like_gene_ids
from transcriptformer.data.store import Location, unreadable
from transcriptformer.errors import DataError, TranscriptFormerError
from transcriptformer.vocab import GeneVocab

logger = logging.getLogger(__name__)


class CellSource:
    """Cells of one file or AnnData.

    Attributes
    ----------
    name
        Name of the file in messages.
    genes
        Gene of each column, and where it was found.
    place, reason
        Where the counts are, and why they were taken from there.
    obs
        Metadata of the cells.
    is_duplicate
        Mask of columns whose gene occurs in an earlier column (genes,), bool.
    """

    def __init__(
        self, contents: Contents, choice: Choice, genes: Genes, config: DataConfig, recovery: Recovery | None
    ) -> None:
        self.name, self.obs, self.store = contents.name, contents.obs, contents.store
        self.matrix: Matrix = choice.place.matrix
        self.genes = genes
        self.place, self.reason = choice.place.name, choice.reason
        self.recovery = recovery
        self.is_duplicate = pd.Index(genes.ids).duplicated() & (genes.ids != "")
        self.merged: np.ndarray | None = None  # column that each column is added to (genes,)
        if config.duplicate_genes == "sum" and self.is_duplicate.any():
            first = pd.Series(np.arange(len(genes.ids))).groupby(genes.ids, sort=False).transform("first").to_numpy()
            self.merged = np.where(genes.ids == "", np.arange(len(genes.ids)), first)

    def __len__(self) -> int:
        return self.matrix.shape[0]

    @property
    def gene_ids(self) -> np.ndarray:
        """Gene id of each column (genes,); empty if missing."""
        return self.genes.ids

    def describe(self) -> dict[str, str]:
        """Describe what was inferred about the input, for the log and the provenance."""
        reason = f" ({self.reason})" if self.reason else ""
        return {"counts": f"counts from {self.place}{reason}", "genes": self.genes.describe()}

    def identify(self) -> str:
        """Return where the counts are and a hash of the gene ids, which depend on the vocabulary and the symbol map."""
        return f"{self.place} {hashlib.sha256(json.dumps(self.gene_ids.tolist()).encode()).hexdigest()}"

    def close(self) -> None:
        """Close the file; the next read reopens it."""
        if self.store is not None:
            self.store.close()

    def load(self) -> None:
        """Read all counts into memory.

        Raises
        ------
        DataError
            If they cannot be read.
        """
        try:
            self.matrix = loaded(self.matrix)
        except DataError:
            raise
        except Exception as error:  # on damaged data, h5py and zarr may raise anything
            raise unreadable(self.name, error) from error

    def counts(self, start: int, stop: int) -> sparse.csr_array:
        """Read the counts (cells, genes), float32, of cells `start:stop` with `to_canonical_csr`.

        Raises
        ------
        DataError
            If they cannot be read, are negative or not finite, or cannot be recovered.
        """
        try:
            values = self.matrix.rows(start, stop)
        except DataError:
            raise
        except Exception as error:  # on damaged data, h5py and zarr may raise anything
            raise unreadable(self.name, error) from error
        matrix = to_canonical_csr(values, self.name)
        self._check(matrix, start)
        if self.recovery is not None:
            matrix = self._recovered(matrix, start, self.recovery)
        if self.merged is not None:
            columns = self.merged.take(matrix.indices)
            matrix = to_canonical_csr(sparse.csr_array((matrix.data, columns, matrix.indptr), matrix.shape), self.name)
        return matrix

    def _check(self, matrix: sparse.csr_array, start: int) -> None:
        counts = matrix.data
        if np.isfinite(counts).all() and counts.min(initial=0) >= 0:
            return
        for is_bad, kind in ((~np.isfinite(counts), "NaN or infinite"), (counts < 0, "negative")):
            if is_bad.any():
                entry = int(is_bad.argmax())
                row = start + int(np.searchsorted(matrix.indptr, entry, side="right")) - 1
                cell = self.obs.rows(row, row + 1, []).index[0]
                raise DataError(
                    f"{self.name}: counts are {kind}, first in cell {cell!r} (row {row}), "
                    f"gene {self.gene_ids[matrix.indices[entry]]}: {counts[entry]}; expected raw counts"
                )

    def _recovered(self, matrix: sparse.csr_array, start: int, recovery: Recovery) -> sparse.csr_array:
        counts, is_exact = recovery.counts(matrix)
        if not is_exact.all():
            row = start + int(np.searchsorted(matrix.indptr, int(is_exact.argmin()), side="right")) - 1
            cell = self.obs.rows(row, row + 1, []).index[0]
            unit = " multiples of the smallest one" if recovery.is_scaled else " counts"
            raise DataError(
                f"{self.name}: --recover-counts: values of cell {cell!r} (row {row}) are not whole{unit}, unlike those "
                "of the sampled cells; use raw counts"
            )
        return sparse.csr_array((counts.astype(np.float32), matrix.indices, matrix.indptr), matrix.shape)


def open_source(
    source: Location | anndata.AnnData,
    config: DataConfig | None = None,
    vocab: GeneVocab | None = None,
    read_in_blocks: bool = True,
) -> CellSource:
    """Locate counts, gene ids and cell metadata, and check that their shapes match, without checking counts.

    Parameters
    ----------
    source
        File, folder or URL of a format of `transcriptformer.data.formats`, of which only metadata and matrices that may
        hold counts are read; or an AnnData, which is not modified.
    config
        Where to find counts and gene ids, and what to do with duplicate genes; None: the defaults.
    vocab
        Vocabulary whose genes are looked for; None: gene ids are judged by their looks.
    read_in_blocks
        Read counts on demand instead of loading them now.

    Raises
    ------
    UsageError
        If the file does not exist, or both a layer and `.raw` are requested.
    DataError
        If it cannot be read, has no cells or genes, lacks the layer or column, or has duplicate genes.
    """
    config = config or DataConfig()
    if isinstance(source, anndata.AnnData):
        contents = contents_of_adata(source, "the AnnData", config.allow_external_links)
    else:
        contents = open_contents(source, config)
    cells = source_of_contents(contents, config, vocab)
    if not read_in_blocks:
        cells.load()
    check_duplicates(cells, config, vocab)
    return cells


def source_of_contents(contents: Contents, config: DataConfig, vocab: GeneVocab | None = None) -> CellSource:
    """Locate counts and gene ids in an open input as `open_source`, without checking for duplicate genes."""
    choice, recovery = _choose(contents, config)
    var = choice.place.read_var()
    _check_shape(contents, choice.place, var)
    if list(var.columns).count(config.gene_col_name) > 1:
        raise DataError(f"{contents.name}: var has several columns {config.gene_col_name!r}; rename them")
    known = None if vocab is None else vocab.genes
    genes = find_genes(var, config.gene_col_name, known, partial(load_symbol_maps, config.gene_map))
    if genes is None:
        raise _no_gene_column(contents, choice, var, config.gene_col_name)
    cells = CellSource(contents, choice, genes, config, recovery)
    if isinstance(cells.matrix, LoadedWhole):
        cells.load()
    return cells


def _choose(contents: Contents, config: DataConfig) -> tuple[Choice, Recovery | None]:
    """Return the matrix with the counts, and how to recover them."""
    wanted = (contents, config.layer, config.use_raw)
    try:
        return recoverable_place(*wanted) if config.recover_counts else (choose_place(*wanted), None)
    except TranscriptFormerError:
        raise
    except Exception as error:  # on damaged data, h5py and zarr may raise anything
        raise unreadable(contents.name, error) from error


def _check_shape(contents: Contents, place: Place, var: pd.DataFrame) -> None:
    name, shape = contents.name, (len(contents.obs), len(var))
    if 0 in shape:
        raise DataError(f"{name}: contains no {'cells' if shape[0] == 0 else 'genes'}")
    if max(shape) > MAX_INT:
        raise DataError(f"{name}: declares {shape[0]:,} cells and {shape[1]:,} genes; at most {MAX_INT:,} can be read")
    if place.matrix.shape != shape:
        raise DataError(
            f"{name}: damaged: counts of shape {place.matrix.shape} for {shape[0]} cells and {shape[1]} genes"
        )


def _no_gene_column(contents: Contents, choice: Choice, var: pd.DataFrame, column: str) -> DataError:
    candidates = [repr(c) for c in var.columns if looks_like_gene_ids(var[c])]
    if looks_like_gene_ids(var.index):
        candidates.append(repr(INDEX))
    columns = ", ".join(map(str, var.columns)) or "none"
    hint = f"; {candidates[0]} looks like gene ids: remove --gene-col-name to find them" if candidates else ""
    where = "raw.var (--use-raw false uses X and var instead)" if choice.place.name == RAW else "var"
    return DataError(f"{contents.name}: {where} has no column {column!r}; its columns are: {columns}{hint}")


def check_duplicates(cells: CellSource, config: DataConfig, vocab: GeneVocab | None = None) -> None:
    """Check that no gene that is used has several columns, or warn about what is done with them.

    Raises
    ------
    DataError
        If a gene has several columns, and the configuration does not say what to do with them.
    """
    repeated = cells.gene_ids[cells.is_duplicate]
    if vocab is not None and config.filter_to_vocabs:
        repeated = np.array([gene for gene in repeated if gene in vocab.genes], object)
    n_duplicates = len(repeated)
    if not n_duplicates:
        return
    some = ", ".join(pd.unique(repeated)[:5])
    if config.duplicate_genes == "error":
        column = cells.genes.column or INDEX
        advice = (
            "add --duplicate-genes first to keep the first of each, or sum to add them up"
            if looks_like_gene_ids(cells.gene_ids)
            else f"{column!r} does not look like Ensembl gene ids; set --gene-col-name to a column of var that does"
        )
        raise DataError(f"{cells.name}: {n_duplicates} columns have duplicate gene ids, e.g. {some}; {advice}")
    done = "added to the first column of their gene" if config.duplicate_genes == "sum" else "dropped"
    logger.warning("%s: %d columns with duplicate gene ids, %s: %s", cells.name, n_duplicates, done, some)
