"""Small AnnData objects for tests, with genes of the synthetic checkpoint."""

from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from tests.golden_cases import CHECKPOINT
from transcriptformer.checkpoint.vocabs import read_gene_ids

GENES = read_gene_ids(CHECKPOINT / "vocabs" / "homo_sapiens_gene.h5")


def make_adata(counts: Any, genes: list[str] | None = None, assay: str = "10x multiome") -> anndata.AnnData:
    """Make cells c0, c1, … with the given counts (cells, genes) of the first genes of the vocabulary."""
    counts = np.asarray(counts, dtype=np.float32)
    genes = GENES[: counts.shape[1]] if genes is None else genes
    return anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame({"assay": assay}, index=[f"c{i}" for i in range(len(counts))]),
        var=pd.DataFrame({"ensembl_id": genes}, index=[f"g{i}" for i in range(len(genes))]),
    )


def random_adata(n_cells: int, n_genes: int = 200, density: float = 0.3, seed: int = 0) -> anndata.AnnData:
    """Make cells with random counts below 60, of which a fraction `density` is nonzero."""
    rng = np.random.default_rng(seed)
    return make_adata(rng.integers(1, 60, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < density))
