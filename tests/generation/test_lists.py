"""Lists of genes and tables of prompts."""

import re
from pathlib import Path

import pytest

from transcriptformer.errors import UsageError
from transcriptformer.generation.lists import read_genes, read_prompts


def test_genes_are_read_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "genes.txt"
    file.write_text("\ufeff# factors\nFOXM1\n\n  E2F1=3 # twice\r\n", encoding="utf-8")
    assert read_genes(file, "--sources") == ["FOXM1", "E2F1=3"]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_prompts_are_read_one_a_row(separator: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    rows = [["name", "genes", "assay", "n_genes"], ["a", "FOXM1=3 E2F1", "MERFISH", "2"], ["", "", "", "0"]]
    file.write_text("\n".join(separator.join(row) for row in rows))
    table = read_prompts(file, "--prompts")
    assert table.names == ["a", "1"]
    assert table.prompts == [[("FOXM1", 3), ("E2F1", 1)], []]
    assert table.aux == {"assay": ["MERFISH", None]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts; give a header with the column genes, and rows"),
        ("genes\n", "holds no prompts"),
        ("gene\nA\n", "has no column 'genes'; its columns are: gene"),
        ("genes,assay\nA\n", "prompt 1 has another number of values than the header"),
        ("genes\nA,B\n", "prompt 1 has another number of values than the header"),
        ("genes\nA=x\n", "A=x: 'x' is not a count"),
        ("name,genes\na,A\na,B\n", "'a' names several prompts"),
        ('genes\n"A\n', "cannot be read"),
    ],
)
def test_a_bad_table_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(content)
    with pytest.raises(UsageError, match=re.escape(f"--prompts {file}")) as caught:
        read_prompts(file, "--prompts")
    assert message in str(caught.value)


def test_a_bad_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("gone", "no such file"), ("empty", "names no gene"), ("binary", "cannot be read")):
        with pytest.raises(UsageError, match=f"^--sources .*{name}.*: {message}"):
            read_genes(tmp_path / name, "--sources")
