"""Matrices of Cell Ranger: HDF5 files of version 2 and 3, which are streamed, and folders with a Matrix Market file."""

import gzip
import logging
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mminfo, mmread

from transcriptformer.data.counts import ColumnSubset, Matrix, MatrixInMemory, StoredCsr, check_memory
from transcriptformer.data.metadata import MetadataInMemory, StoredMetadata
from transcriptformer.data.places import Contents, Place, X
from transcriptformer.data.store import Store, unreadable
from transcriptformer.errors import DataError, TranscriptFormerError, UsageError, one_line
from transcriptformer.storage.external import check_folder

logger = logging.getLogger(__name__)

GENE_EXPRESSION = "Gene Expression"
"""Type of the features that are genes; others are antibodies, guides or peaks."""

_ARRAYS = ("barcodes", "data", "indices", "indptr", "shape")

_PARTS = {"matrix.mtx": "matrix", "features.tsv": "features", "genes.tsv": "features", "barcodes.tsv": "barcodes"}
_PART = re.compile(rf"(.*?)({'|'.join(map(re.escape, _PARTS))})(?:\.gz)?")

_TABLE_COLUMNS = ("gene_ids", "feature_name", "feature_type")

_BYTES_PER_ENTRY = 40
"""Peak memory of reading an entry of a Matrix Market file and converting it to CSR."""


def find_group(store: Store) -> str | None:
    """Return the group with the matrix of a Cell Ranger file; None for other files.

    Raises
    ------
    DataError
        If the file has several genomes, each with its own matrix.
    """
    if "matrix/features" in store or "matrix/indptr" in store:
        return "matrix"
    genomes = [name for name in store.names_in("", ()) if f"{name}/genes" in store and f"{name}/barcodes" in store]
    if len(genomes) > 1:
        raise DataError(
            f"{store.name}: has one matrix per genome: {', '.join(genomes)}; write one to a file of its own: "
            f'scanpy.read_10x_h5(file, genome="{genomes[0]}").write_h5ad("{genomes[0]}.h5ad")'
        )
    return genomes[0] if genomes else None


def contents_of_h5(store: Store, group: str) -> Contents:
    """Return what the group of a Cell Ranger file holds.

    Raises
    ------
    DataError
        If a part is missing, or no feature is a gene.
    """
    is_v3 = f"{group}/features" in store
    ids = "features/id" if is_v3 else "genes"
    missing = [name for name in (*_ARRAYS, ids) if f"{group}/{name}" not in store]
    if missing:
        raise DataError(
            f"{store.name}: incomplete: {group} lacks {', '.join(missing)}; expected a file of Cell Ranger such as "
            "filtered_feature_bc_matrix.h5"
        )
    features = _read_features(store, f"{group}/features", "id") if is_v3 else _read_features(store, group, "genes")
    if not is_v3:
        features["genome"] = group
    is_gene = _are_genes(features, store.name)
    obs = StoredMetadata(store, group, "barcodes", [])
    open_counts = partial(_open_counts, store, group, is_gene)
    place = Place(store.name, f"/{group}", open_counts, lambda: features[is_gene])
    return Contents(store.name, {X: place}, obs, store)


def _read_features(store: Store, key: str, ids: str) -> pd.DataFrame:
    names = {"name": "feature_name", "gene_names": "feature_name", "feature_type": "feature_type", "genome": "genome"}
    table = StoredMetadata(store, key, ids, [name for name in names if f"{key}/{name}" in store])
    features = table.rows(0, len(table)).rename(columns=names)
    features.insert(0, "gene_ids", features.index)
    return features


def _are_genes(features: pd.DataFrame, name: str) -> np.ndarray:
    """Return a mask of the features that are genes (features,)."""
    if "feature_type" not in features:
        return np.ones(len(features), bool)
    is_gene = (features["feature_type"] == GENE_EXPRESSION).to_numpy()
    others = ", ".join(map(str, features["feature_type"][~is_gene].unique()[:5]))
    if not is_gene.any():
        raise DataError(f"{name}: has no features of type {GENE_EXPRESSION!r}; its types are: {others or 'none'}")
    if not is_gene.all():
        logger.info("%s: leaving out %d features that are not genes (%s)", name, (~is_gene).sum(), others)
    return is_gene


def _open_counts(store: Store, group: str, is_gene: np.ndarray) -> Matrix:
    """Open a CSC matrix of features and cells as the CSR matrix of cells and genes that it is."""
    with store.reading():
        n_features, n_cells = map(int, store[group]["shape"][:])
        stored: Matrix = StoredCsr(store, group, (n_cells, n_features))
        if n_features != len(is_gene):
            raise DataError(f"{store.name}: damaged: {group} has {n_features} rows for {len(is_gene)} features")
        return stored if is_gene.all() else ColumnSubset(stored, np.flatnonzero(is_gene))


class MatrixFolder(NamedTuple):
    """Files of a matrix in a folder of Cell Ranger."""

    matrix: Path
    features: Path
    barcodes: Path


def find_files(folder: Path) -> MatrixFolder | None:
    """Find the files of the matrix in a folder; None if there are none.

    Their names may have a prefix, as in GEO.

    Raises
    ------
    UsageError
        If a file is missing, or there are several matrices.
    """
    found: dict[str, dict[str, Path]] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"--data-file {folder}: cannot be read ({one_line(error)})") from error
    for path in paths:
        if match := _PART.fullmatch(path.name):
            found.setdefault(match[1], {})[_PARTS[match[2]]] = path
    if not found:
        return None
    if len(found) > 1:
        prefixes = ", ".join(f"{prefix}*" for prefix in list(found)[:5])
        raise UsageError(f"--data-file {folder}: has several matrices ({prefixes}); move each to a folder of its own")
    files = found.popitem()[1]
    missing = [name for name, part in _PARTS.items() if part not in files and name != "genes.tsv"]
    if missing:
        raise UsageError(
            f"--data-file {folder}: lacks {' and '.join(missing)} (or .gz); expected matrix.mtx, features.tsv or "
            "genes.tsv, and barcodes.tsv, as written by Cell Ranger"
        )
    return MatrixFolder(**files)


def contents_of_folder(folder: Path, files: MatrixFolder, allow_external: bool) -> Contents:
    """Return what the folder of Cell Ranger holds; the matrix is loaded when it is opened.

    Raises
    ------
    DataError
        If a file is damaged, or no feature is a gene.
    """
    check_folder(folder, allow_external)
    features, barcodes = _read_table(files.features), _read_table(files.barcodes)
    features = features.iloc[:, : len(_TABLE_COLUMNS)]
    features.columns = pd.Index(_TABLE_COLUMNS[: features.shape[1]])
    features.index = pd.Index(features["gene_ids"].to_numpy())
    is_gene = _are_genes(features, str(folder))
    obs = MetadataInMemory(pd.DataFrame(index=pd.Index(barcodes[0].to_numpy())))
    load_counts = partial(_load_counts, files.matrix, is_gene)
    place = Place(str(folder), files.matrix.name, load_counts, lambda: features[is_gene])
    return Contents(str(folder), {X: place}, obs)


def _read_table(path: Path) -> pd.DataFrame:
    """Read a table of text without a header."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            rows = [line.rstrip("\r\n").split("\t") for line in file]
    except Exception as error:  # gzip, zlib and the decoder have their own
        raise unreadable(str(path), error) from error
    if not rows:
        raise DataError(f"{path}: is empty")
    width = len(rows[0])
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise DataError(f"{path}: damaged: line {number} has {len(row)} columns, but line 1 has {width}")
    return pd.DataFrame(rows, columns=range(width), dtype=object)


def _load_counts(path: Path, is_gene: np.ndarray) -> Matrix:
    try:
        n_features, _, n_entries, *_ = mminfo(path)
        if n_features != len(is_gene):
            raise DataError(f"{path}: damaged: has {n_features} rows for {len(is_gene)} features")
        check_memory(
            _BYTES_PER_ENTRY * n_entries, f"{path}: loading", "use the .h5 file of Cell Ranger, which is streamed"
        )
        logger.info("%s: loading the whole matrix, because Matrix Market files cannot be streamed", path)
        counts = sparse.csr_matrix(mmread(path).T, dtype=np.float32)
        return MatrixInMemory(counts if is_gene.all() else counts[:, np.flatnonzero(is_gene)])
    except TranscriptFormerError:
        raise
    except Exception as error:  # on damaged data, the parser may raise anything
        raise unreadable(str(path), error) from error
