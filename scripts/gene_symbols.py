"""Write the shipped maps of gene symbols to gene ids, from h5ad files of CELLxGENE with `feature_name` in `var`.

    python scripts/gene_symbols.py FILE.h5ad ...

Each file adds its genes to gene_symbols/<species>.tsv.gz, by the species of their ids.
"""

import gzip
import sys
from pathlib import Path

import anndata

from transcriptformer.data.species import likely_species

FOLDER = Path(__file__).parents[1] / "gene_symbols"

HEADER = """\
# Ensembl gene ids and symbols, from var[["ensembl_id", "feature_name"]] of datasets of CELLxGENE Discover,
# whose schema takes both from GENCODE. Written by scripts/gene_symbols.py.
"""


def main(files: list[str]) -> None:
    """Collect the pairs of each species, and write them sorted by id."""
    pairs: dict[str, dict[str, str]] = {}
    for file in files:
        var = anndata.read_h5ad(file, backed="r").var
        species = likely_species(var["ensembl_id"])
        assert species is not None, f"{file}: unknown species"
        found = zip(var["ensembl_id"].astype(str), var["feature_name"].astype(str), strict=True)
        # CELLxGENE appends the id to symbols that several genes share.
        names = {gene: name.removesuffix(f"_{gene}") for gene, name in found}
        pairs.setdefault(species, {}).update({gene: name for gene, name in names.items() if name != gene})
    FOLDER.mkdir(exist_ok=True)
    for species, names in pairs.items():
        lines = "".join(f"{gene}\t{name}\n" for gene, name in sorted(names.items()))
        path = FOLDER / f"{species}.tsv.gz"
        with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as compressed:
            compressed.write((HEADER + "ensembl_id\tfeature_name\n" + lines).encode())
        print(f"{path}: {len(names):,} genes, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
