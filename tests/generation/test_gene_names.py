"""Genes are found by id or symbol; those that are not are listed with the nearest names."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.generation.checkpoints import load
from tests.h5ad_files import GENES
from transcriptformer.errors import UsageError
from transcriptformer.generation.gene_names import gene_symbols, gene_tokens

LGALS1 = "ENSG00000100097"


@pytest.mark.parametrize("name", [LGALS1, "LGALS1", f"{LGALS1}.12", LGALS1.lower(), f" {LGALS1}"])
def test_a_gene_is_found_by_id_and_symbol(name: str) -> None:
    checkpoint = load()
    tokens = gene_tokens([GENES[5], name], checkpoint, "--gene")
    assert checkpoint.gene_vocab.names()[tokens].tolist() == [GENES[5], LGALS1]
    assert tokens.dtype == np.int64


def test_no_genes_have_no_tokens() -> None:
    assert gene_tokens([], load(), "--gene").shape == (0,)


@pytest.mark.parametrize("name", ["lgals1", "LGALS-1", "ENSG00000100097x"])
def test_an_unknown_gene_is_listed_with_the_nearest_names(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        gene_tokens(["LGALS1", name], load(), "--gene")
    message = str(caught.value)
    assert message.startswith(f"--gene: 1 gene is not in the checkpoint's vocabulary: {name!r} (nearest: ")
    assert ("LGALS1" if name.lower().startswith("lg") else LGALS1) in message


def test_many_unknown_genes_are_one_line() -> None:
    names = [f"what{i}is that" for i in range(7)]
    with pytest.raises(UsageError, match=re.escape("--gene: 7 genes are not in the checkpoint's vocabulary: 'what0is")):
        gene_tokens([*names, *names], load(), "--gene")
    with pytest.raises(UsageError, match=r"'what4is that' and 2 more$"):
        gene_tokens(names, load(), "--gene")


def test_a_symbol_of_several_genes_is_listed_with_their_ids(tmp_path: Path) -> None:
    table = tmp_path / "map.tsv"
    rows = ["gene_id\tgene_symbol", f"{GENES[0]}\tABC", f"{GENES[1]}\tABC", f"{GENES[2]}\tXYZ", "ENSG00000000001\tXYZ"]
    table.write_text("\n".join(rows))
    checkpoint = load(gene_map=str(table))
    expected = f"1 symbol stands for several genes; name one by id: 'ABC' ({GENES[0]}, {GENES[1]})"
    with pytest.raises(UsageError, match=re.escape(expected)):
        gene_tokens(["ABC"], checkpoint, "--gene")
    known = checkpoint.gene_vocab.names()[gene_tokens(["XYZ"], checkpoint, "--gene")]
    assert known.tolist() == [GENES[2]], "its other gene is not in the vocabulary"


def test_genes_have_symbols_where_the_map_has_them(tmp_path: Path) -> None:
    table = tmp_path / "map.tsv"
    table.write_text(f"gene_id\tgene_symbol\n{GENES[3]}\tABC\n{GENES[3]}\tSynonym\n")
    symbols = gene_symbols(load(gene_map=str(table)))
    assert len(symbols) == len(GENES)
    assert symbols[3] == "ABC"
    assert set(np.delete(symbols, 3)) == {""}
    assert gene_symbols(load())[GENES.index(LGALS1)] == "LGALS1"
