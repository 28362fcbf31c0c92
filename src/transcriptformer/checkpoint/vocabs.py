"""The files of `vocabs/`: protein embeddings, whose order defines the gene vocabulary, and metadata vocabularies."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from transcriptformer.checkpoint.files import read_json
from transcriptformer.errors import CheckpointError, DataError, one_line
from transcriptformer.storage.external import Guard, check_hdf5
from transcriptformer.vocab import AuxVocab, GeneVocab, make_gene_vocab

MAX_AUX_TOKENS = 2**20
"""Limit on the tokens of a metadata column; published checkpoints have dozens."""


def read_gene_ids(path: Path, allow_external: bool = False) -> list[str]:
    """Read the gene ids of a protein-embedding file, in file order, without the embeddings.

    Raises
    ------
    CheckpointError
        If the file is missing, is not HDF5 or has no dataset `keys`; or if the dataset is stored in another file and
        `allow_external` is false.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: vocabulary file missing")
    with _reading(path, "a dataset 'keys' of gene ids"):
        check_hdf5(path, ("keys",), allow_external)
        with h5py.File(path) as file:
            keys = file["keys"][:]
        return [key.decode() if isinstance(key, bytes) else str(key) for key in keys]


@contextmanager
def _reading(path: Path, content: str) -> Iterator[None]:
    """Raise errors in reading a protein-embedding file, which should have that content, as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # on damaged data, h5py may raise anything
        raise CheckpointError(f"{path}: not a protein-embedding file with {content} ({one_line(error)})") from error


def read_gene_vocab(
    paths: Sequence[Path], special_tokens: Sequence[str], pad_token: str, allow_external: bool = False
) -> GeneVocab:
    """Read a vocabulary of the genes in `paths`, in order; duplicate genes keep their first token."""
    gene_ids = (gene for path in paths for gene in read_gene_ids(path, allow_external))
    return make_gene_vocab(gene_ids, special_tokens, pad_token)


def read_protein_embeddings(paths: Sequence[Path], allow_external: bool = False) -> tuple[list[str], np.ndarray]:
    """Read the unique gene ids of one or more files and their protein embeddings (genes, P), float32.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, lacks the embedding of a gene, or embeddings differ in width; or if some are
        stored in another file and `allow_external` is false.
    """
    rows: dict[str, np.ndarray] = {}
    width = None
    for path in paths:
        genes, guard = read_gene_ids(path, allow_external), Guard(str(path), allow_external)
        with _reading(path, "a group 'arrays'"), h5py.File(path) as file:
            arrays = guard.open(file, "arrays")
            for gene in genes:
                if gene in rows:
                    continue
                dataset = guard.open(arrays, gene)
                guard.check(dataset, f"arrays/{gene}")
                rows[gene] = row = dataset[:].astype(np.float32)
                width = width or row.shape
                if row.shape != width or row.ndim != 1:
                    raise CheckpointError(f"{path}: the embedding of {gene} has shape {row.shape}, not {width}")
                if not np.isfinite(row).all():
                    raise CheckpointError(f"{path}: the embedding of {gene} contains NaN or infinite values")
    if not rows:
        raise CheckpointError(f"{', '.join(map(str, paths))}: contains no genes")
    return list(rows), np.stack(list(rows.values()))


def write_protein_embeddings(file: h5py.File, gene_ids: Sequence[str], embeddings: np.ndarray) -> None:
    """Write gene ids and their protein embeddings (genes, P), as float32, to an empty file."""
    file["keys"] = np.array([gene.encode() for gene in gene_ids])
    arrays = file.create_group("arrays")
    for gene, row in zip(gene_ids, embeddings, strict=True):
        arrays[gene] = np.asarray(row, dtype=np.float32)


def read_aux_vocab(path: Path, column: str, unknown: str) -> AuxVocab:
    """Read `<column>_vocab.json`.

    Raises
    ------
    CheckpointError
        If the file is missing, is not a JSON object of ids, or lacks the token `unknown`.
    """
    try:
        ids = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: vocabulary file missing") from None
    if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()) or unknown not in ids:
        raise CheckpointError(f"{path}: not a JSON object of token ids with an entry {unknown!r}")
    for value, number in ids.items():
        if not 0 <= number < MAX_AUX_TOKENS:
            raise CheckpointError(f"{path}: token id {number} of {value!r} is not between 0 and {MAX_AUX_TOKENS - 1}")
    return AuxVocab(column, ids, ids[unknown])
