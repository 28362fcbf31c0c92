"""Genes and proteins read from FASTA files, and files that are refused."""

import gzip
from pathlib import Path

import pytest

from tests.proteins.fasta_files import METAZOA, VERSIONLESS, VERTEBRATE, WITHOUT_SYMBOL, write_fasta
from transcriptformer.errors import DataError, TranscriptFormerError, UsageError
from transcriptformer.proteins.fasta import read_proteins

HEADERS = [VERTEBRATE, METAZOA, WITHOUT_SYMBOL, VERSIONLESS]


def genes(path: Path, id_from: str = "gene") -> list[str]:
    return [protein.gene for protein in read_proteins(path, id_from)]


@pytest.mark.parametrize("name", ["proteins.fa", "proteins.fa.gz"])
def test_gene_ids_of_real_headers_lose_their_versions(name: str, tmp_path: Path) -> None:
    path = write_fasta(tmp_path / name, [(header, "MKV" * 50) for header in HEADERS])
    assert genes(path) == ["ENSG00000139618", "FBgn0031081", "ENSMUSG00000000001", "YAL001C"]
    assert {protein.residues for protein in read_proteins(path)} == {"MKV" * 50}


def test_symbols_replace_gene_ids_on_request_where_there_is_one(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "proteins.fa", [(header, "MKV") for header in HEADERS])
    assert genes(path, "gene_symbol") == ["BRCA2", "Nep3", "ENSMUSG00000000001", "TFC3"]


@pytest.mark.parametrize(
    ("header", "pattern", "gene"),
    [
        ("ENSP1.2|ENST1.2|ENSG00000186092.7|OTTHUMG1|OR4F5", r"\|(ENSG\d+)", "ENSG00000186092"),
        ("sp|P51587|BRCA2_HUMAN Breast cancer OS=Homo sapiens OX=9606 GN=BRCA2 PE=1 SV=3", r"GN=(\S+)", "BRCA2"),
        ("lcl|NC_1_prot_X_1 [gene=LOC1] [locus_tag=AT1_5] [protein=x]", r"\[locus_tag=([^\]]+)\]", "AT1_5"),
        ("FBpp1 type=polypeptide; parent=FBgn0031081,FBtr1;", r"parent=(FBgn\d+)", "FBgn0031081"),
        ("scaffold_7.g12.t1", r"^(\w+)", "scaffold_7"),
    ],
)
def test_a_regular_expression_finds_genes_of_other_sources(
    header: str, pattern: str, gene: str, tmp_path: Path
) -> None:
    assert genes(write_fasta(tmp_path / "proteins.fa", [(header, "MKV")]), pattern) == [gene]


@pytest.mark.parametrize("id_from", ["gene", r"gene:(\S+)"])
def test_dots_belong_to_ids_that_have_no_version(id_from: str, tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "proteins.fa", [("Aqu2.1.00123_001 gene:Aqu2.1.00123", "MKV")])
    assert genes(path, id_from) == ["Aqu2.1.00123"]


@pytest.mark.parametrize(
    ("fields", "id_from", "shared"),
    [
        (["gene:A.1 x:Y", "gene:B.1 x:Y"], r"x:(\S+)", "Y stands for A.1 and B.1"),
        (["gene:G1.1 gene_symbol:X", "gene:G2.1 gene_symbol:X"], "gene_symbol", "X stands for G1.1 and G2.1"),
    ],
)
def test_genes_that_get_the_same_id_are_a_warning(
    fields: list[str], id_from: str, shared: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_fasta(tmp_path / "proteins.fa", [(f"P{i} {field}", "MKV") for i, field in enumerate(fields)])
    assert len(set(genes(path, id_from))) == 1
    assert f"1 gene ids are ambiguous, and their genes are merged: {shared}" in caplog.text


def test_isoforms_of_a_gene_are_not_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [(f"P{i} gene:ENSG00000139618.7", "MKV") for i in range(3)]
    assert genes(write_fasta(tmp_path / "proteins.fa", records)) == ["ENSG00000139618"] * 3
    assert caplog.text == ""


def test_soft_masked_residues_are_upper_cased_and_windows_line_endings_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fa"
    path.write_bytes(b"\r\n>P1 gene:G1\r\nmkvLA*\r\nX\r\n\r\n>P2 gene:G2\r\nMK\r\n")
    assert [protein.residues for protein in read_proteins(path)] == ["MKVLA*X", "MK"]


def test_whitespace_in_sequences_is_dropped_and_only_a_line_that_starts_with_it_begins_a_record(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fa"
    path.write_bytes(b" \n>P1 gene:G1 a>b \nMK V\tLA \r\n L\n\n>P2 gene:G2\nMK>A")
    assert read_proteins(path) == [("G1", "MKVLAL"), ("G2", "MK>A")]


def test_headers_may_be_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "proteins.fa"
    path.write_bytes(b">P1 gene:G1 description:M\xfcller\nMKV\n")
    assert genes(path) == ["G1"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\n\n", gzip.compress(b"")):
        (tmp_path / "proteins.fa").write_bytes(content)
        with pytest.raises(DataError, match=r"proteins.fa: no proteins in the file"):
            read_proteins(tmp_path / "proteins.fa")


@pytest.mark.parametrize("nucleotides", ["ACGT", "acgu", "ACGTNNNN"])
def test_nucleotides_are_refused(nucleotides: str, tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "cdna.fa", [(VERTEBRATE, nucleotides * 30), (METAZOA, nucleotides * 20)])
    with pytest.raises(DataError, match=r"cdna.fa: DNA or RNA, not proteins: 100 % .*pep.all.fa.gz"):
        read_proteins(path)


def test_a_duplicate_protein_is_refused(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "proteins.fa", [(header, "MKV") for header in [*HEADERS, METAZOA]])
    with pytest.raises(DataError, match=r"record 5, '>FBpp.*: duplicate of protein FBpp0070000 in record 2"):
        read_proteins(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_gzip_is_refused(kept: float, tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "proteins.fa.gz", [(f"P{i} gene:G{i}", "MKVLAY" * i) for i in range(1, 300)])
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(DataError, match=r"proteins.fa.gz: truncated or damaged"):
        read_proteins(path)


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "proteins.fa.gz", [(f"P{i} gene:G{i}", "MKVLAY" * i) for i in range(1, 300)])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"proteins.fa.gz: truncated or damaged"):
        read_proteins(path)


@pytest.mark.parametrize("header", ["P1 pep chromosome:1", "", "P1 gene_symbol:BRCA2", "P1 gene:", "gene"])
def test_a_header_without_an_id_is_refused(header: str, tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "proteins.fa", [(VERTEBRATE, "MKV"), (header, "MKV")])
    with pytest.raises(DataError, match=r"record 2, '>.*': no gene id \(expected gene:…\); set --id-from to where"):
        read_proteins(path)


def test_a_header_that_does_not_match_the_regular_expression_is_refused(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "proteins.fa", [("P1 GN=A", "MKV"), ("P2 GN=", "MKV")])
    with pytest.raises(DataError, match=r"record 2, '>P2 GN=': no gene id \(no match for GN="):
        read_proteins(path, r"GN=(\w+)")


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("gene:(", "not a regular expression"), (r"gene:\S+", "0 groups; use gene,"), ("(a)(b)", "2 groups; use gene,")],
)
def test_a_pattern_without_exactly_one_group_is_refused(pattern: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        read_proteins(tmp_path / "proteins.fa", pattern)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello\n>P1 gene:G1\nMKV\n", "not FASTA"),
        (b"\x89HDF\r\n\x1a\n" + bytes(range(256)), "not FASTA"),
        (b"<html>Log in</html>", "not FASTA"),
        (b">P1 gene:G1\n>P2 gene:G2\nMKV\n", "record 1, '>P1 gene:G1': no residues"),
        (b">P1 gene:a/b\nMKV\n", "'a/b' is not a valid HDF5 name"),
    ],
)
def test_other_faults_of_a_file_are_reported(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "proteins.fa"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_proteins(path)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent.fa", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(TranscriptFormerError, match=reason):
            read_proteins(path)
