"""Gene ids and symbols are found in any column and spelling; nothing is guessed."""

import gzip
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tests.golden_cases import REAL
from tests.h5ad_files import make_adata
from transcriptformer.config import DataConfig
from transcriptformer.data.gene_map import load_symbol_maps, read_symbol_map
from transcriptformer.data.genes import Genes, SymbolMap, find_genes, resolve
from transcriptformer.data.source import open_source
from transcriptformer.errors import DataError, UsageError
from transcriptformer.vocab import GeneVocab

A, B, C, D = (f"ENSG0000010000{i}" for i in range(4))
KNOWN = {
    A,
    B,
    C,
    D,
    "Aqu2.1.00123",
    "SPAC23H4.16c",
    "nkx2.5",
    "gene12.L",
    "FBgn0031208",
    "WBGene00000001",
    "ENSMUSG00000000007",
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (A, A),
        (f"{A}.19", A),
        (f" {A}\t", A),
        (f"{A.lower()}.2", A),
        (f"GRCh38_{A}", A),
        (f"GRCh38_______{A}.4", A),
        ("mm10___ENSMUSG00000000007", "ENSMUSG00000000007"),
        ("fbgn0031208", "FBgn0031208"),
        ("WBGENE00000001", "WBGene00000001"),
        (A.encode(), A),
        (f"{A}.12_PAR_Y", f"{A}.12_PAR_Y"),  # another column than its copy on X
        (f"{A}_PAR_Y", f"{A}_PAR_Y"),
        ("Aqu2.1.00123", "Aqu2.1.00123"),
        ("SPAC23H4.16c", "SPAC23H4.16c"),
        ("nkx2.5", "nkx2.5"),
        ("nkx2", "nkx2"),
        ("gene12.L", "gene12.L"),
        ("gene12.S", "gene12.S"),
        ("ENSG00000999999.3", "ENSG00000999999.3"),  # unknown without version, too
        *((missing, "") for missing in (None, np.nan, "", " ", "nan", "None", "NA", "<NA>", pd.NA)),
    ],
)
def test_ids_are_known_in_any_spelling_but_no_other_gene_is_guessed(value: object, expected: str) -> None:
    assert resolve([value], KNOWN) == [expected]


def test_an_id_with_a_version_in_the_vocabulary_stands_for_itself() -> None:
    assert resolve([f"{A}.1", f"{A}.2"], {A, f"{A}.1"}) == [f"{A}.1", A]


def test_without_a_vocabulary_versions_of_stable_ids_are_removed() -> None:
    assert resolve([f"{A}.3", "nkx2.5", "Aqu2.1.00123"], None) == [A, "nkx2.5", "Aqu2.1.00123"]


def genes_in(wanted: str = "auto", index: list[str] | None = None, **columns: Any) -> Genes | None:
    n = len(next(iter(columns.values()), index or []))
    var = pd.DataFrame(columns, index=index or [f"x{i}" for i in range(n)])
    return find_genes(var, wanted, KNOWN)


@pytest.mark.parametrize("column", ["ensembl_id", "feature_id", "gene_ids", "gene_id", "Accession", "my own ids"])
def test_ids_are_found_in_any_column(column: str) -> None:
    ids: dict[str, Any] = {column: [A, f"{B}.2"]}
    found = genes_in(index=["TP53", "BRCA1"], symbol=["TP53", "BRCA1"], number=[1, 2], **ids)
    assert found is not None
    assert (found.column, list(found.ids), found.n_known, found.n_respelled) == (column, [A, B], 2, 1)


def test_ids_are_found_in_the_index() -> None:
    found = genes_in(index=[A, B], symbol=["TP53", "BRCA1"])
    assert found is not None
    assert (found.column, list(found.ids)) == (None, [A, B])


def test_the_column_that_covers_most_of_the_vocabulary_wins() -> None:
    found = genes_in(ensembl_id=["x", "y", A], gene_ids=[A, B, "z"])
    assert found is not None
    assert found.column == "gene_ids"
    tied = genes_in(index=[C, D], feature_id=[A, B], gene_ids=[A, B])
    assert tied is not None
    assert tied.column == "feature_id"


def test_a_named_column_is_taken_even_if_another_has_more_genes() -> None:
    found = genes_in("mine", mine=[A, "x"], ensembl_id=[A, B])
    assert found is not None
    assert list(found.ids) == [A, "x"]
    assert genes_in("nothing", ensembl_id=[A]) is None


def test_copies_on_y_are_left_out_and_told() -> None:
    found = genes_in(ensembl_id=[f"{A}.12", f"{A}.12_PAR_Y", B])
    assert found is not None
    assert found.n_known == 2
    assert "1 copies on Y (…_PAR_Y) left out" in found.describe()


SYMBOLS: SymbolMap = {"TP53": (A,), "BRCA1": (B,), "TWICE": (C, D), "FOREIGN": ("ENSG00000999999",)}


def by_symbol(*symbols: str, column: str = "feature_name") -> Genes:
    var = pd.DataFrame({column: symbols}, index=[str(i) for i in range(len(symbols))])
    found = find_genes(var, "auto", KNOWN, lambda: {"the map": SYMBOLS})
    assert found is not None
    return found


def test_symbols_are_mapped_and_the_others_are_listed() -> None:
    found = by_symbol("TP53", "BRCA1", "TWICE", "tp53", "NOVEL")
    assert list(found.ids) == [A, B, "", "", ""]
    assert found.symbols is not None
    assert (found.symbols.n_mapped, found.symbols.unknown, found.symbols.ambiguous) == (
        2,
        ("tp53", "NOVEL"),
        ("TWICE",),
    )
    assert found.describe() == (
        "gene symbols from var['feature_name']: 2 symbols mapped to gene ids by the map; 2 unknown, left out: tp53, "
        "NOVEL; 1 ambiguous, left out: TWICE"
    )


def test_ids_among_symbols_stay() -> None:
    assert list(by_symbol("TP53", B, f"{C}.2").ids) == [A, B, C]


def test_ids_are_preferred_to_symbols() -> None:
    var = pd.DataFrame({"feature_name": ["TP53", "BRCA1", "x"], "gene_ids": [C, D, "y"]}, index=["1", "2", "3"])
    found = find_genes(var, "auto", KNOWN, lambda: {"the map": SYMBOLS})
    assert found is not None
    assert (found.column, found.symbols) == ("gene_ids", None)


TABLE = f"ensembl_id\tfeature_name\n{A}\tTP53\n{B}.7\tBRCA1\n{C}\tTWICE\n{D}\tTWICE\n"
GTF = "".join(
    f'1\tHAVANA\tgene\t1\t2\t.\t+\t.\tgene_id "{gene}.4"; gene_type "x"; gene_name "{name}";\n'
    for gene, name in ((A, "TP53"), (B, "BRCA1"), (C, "TWICE"), (D, "TWICE"))
)
FASTA = "".join(
    f">P{i} pep gene:{gene}.4 transcript:T gene_symbol:{name} description:x\nMKV\n"
    for i, (gene, name) in enumerate(((A, "TP53"), (B, "BRCA1"), (C, "TWICE"), (D, "TWICE")))
)
BIOMART = "Gene stable ID,Gene description,Gene name\n" + "".join(
    f'{gene},"a gene, described",{name}\n' for gene, name in ((A, "TP53"), (B, "BRCA1"), (C, "TWICE"), (D, "TWICE"))
)
FROM_R = "".join(
    f"{line}\n" for line in ("gene_id\tsymbol", f"1\t{A}\tTP53", f"2\t{B}\tBRCA1", f"3\t{C}\tTWICE", f"4\t{D}\tTWICE")
)
PLAIN = f"TP53,{A}\nBRCA1,{B}\nTWICE,{C}\nTWICE,{D}\n"


@pytest.mark.parametrize("text", [TABLE, GTF, FASTA, BIOMART, FROM_R, PLAIN])
@pytest.mark.parametrize("is_gzip", [False, True])
def test_maps_are_read_from_files(text: str, is_gzip: bool, tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(gzip.compress(text.encode()) if is_gzip else text.encode())
    assert read_symbol_map(path) == {"TP53": (A,), "BRCA1": (B,), "TWICE": (C, D)}


def test_a_map_is_read_from_the_var_of_an_h5ad(tmp_path: Path) -> None:
    var = pd.DataFrame({"gene_symbols": ["TP53", "BRCA1"]}, index=[A, B])
    anndata.AnnData(np.ones((1, 2), np.float32), var=var).write_h5ad(tmp_path / "map.h5ad")
    assert read_symbol_map(tmp_path / "map.h5ad") == {"TP53": (A,), "BRCA1": (B,)}


def test_a_table_whose_columns_are_not_named_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.csv"
    path.write_text(f"accession_number,what,kind\n{A},TP53,protein\n{B},BRCA1,protein\n")
    with pytest.raises(DataError, match="none of its columns accession_number, what, kind is named like gene_symbol"):
        read_symbol_map(path)


@pytest.mark.parametrize("dtype", ["string", object])
def test_missing_ids_are_left_out(dtype: Any) -> None:
    found = genes_in(gene_ids=pd.array([A, None, B], dtype=dtype))
    assert found is not None
    assert list(found.ids) == [A, "", B]


def test_a_column_named_index_does_not_hide_the_index() -> None:
    found = find_genes(pd.DataFrame({"index": ["0", "1"]}, index=[A, B]), "auto", KNOWN)
    assert found is not None
    assert (found.column, list(found.ids)) == (None, [A, B])


def test_columns_that_cannot_be_read_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adata = anndata.AnnData(np.ones((1, 2), np.float32), var=pd.DataFrame({"text": ["x", "y"]}, index=[A, B]))
    adata.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        del file["var/text"]
        file["var"].create_dataset("text", data=np.array([b"caf\xe9", b"y"], object), dtype=h5py.string_dtype())
        file["var/text"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    assert list(open_source(tmp_path / "x.h5ad").gene_ids) == [A, B]
    assert "column 'text' contains text that is not UTF-8" in caplog.text


def test_a_file_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match=r"--gene-map .*empty: no pairs of gene ids and symbols; give a table"):
        read_symbol_map(tmp_path / "empty")
    with pytest.raises(UsageError, match="no such file"):
        read_symbol_map(tmp_path / "nothing")


@pytest.mark.skipif(not REAL.is_dir(), reason="no real cells")
@pytest.mark.parametrize("name", ["human_heart_100", "mouse_brain_merfish_1000"])
def test_symbols_of_real_files_give_their_genes_back(name: str) -> None:
    adata = anndata.read_h5ad(REAL / "data" / f"{name}.h5ad")
    expected = adata.var["ensembl_id"].astype(str).to_numpy()
    vocab = GeneVocab((), {gene: i for i, gene in enumerate(expected)})
    names = pd.Index(adata.var["feature_name"].astype(str))
    bare = anndata.AnnData(sparse.csr_matrix(adata.X[:2]), var=pd.DataFrame(index=names))
    source = open_source(bare, DataConfig(), vocab)
    mapped = source.gene_ids != ""
    assert mapped.mean() >= 0.99
    assert (source.gene_ids[mapped] == expected[mapped]).all()
    assert source.genes.symbols is not None


def test_the_shipped_maps_do_not_mix_species() -> None:
    maps = load_symbol_maps(None)
    assert {next(iter(found.values()))[0][:7] for found in maps.values()} == {"ENSG000", "ENSMUSG"}


def test_a_damaged_column_of_ids_is_not_replaced_by_another(tmp_path: Path) -> None:
    adata = make_adata([[1, 2, 3]])
    adata.var["text"] = ["a", "b", "c"]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    for column in ("text", "ensembl_id"):
        with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
            del file["var"][column].attrs["encoding-version"]
        if column == "text":
            source = open_source(tmp_path / "cells.h5ad")
            assert len(source.gene_ids) == 3
            source.close()
    with pytest.raises(DataError, match="column 'ensembl_id' is damaged: its encoding has no version"):
        open_source(tmp_path / "cells.h5ad")
