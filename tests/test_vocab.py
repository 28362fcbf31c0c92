import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from transcriptformer.checkpoint.vocabs import read_aux_vocab, read_gene_ids, read_gene_vocab
from transcriptformer.errors import CheckpointError
from transcriptformer.vocab import AuxVocab, GeneVocab

SPECIAL = ["unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]"]


def write_embeddings(path: Path, genes: list[str]) -> Path:
    with h5py.File(path, "w") as file:
        file["keys"] = np.array(genes, dtype="S")
    return path


def test_special_tokens_precede_the_genes_of_each_file(tmp_path: Path) -> None:
    paths = [write_embeddings(tmp_path / "a.h5", ["G2", "G1"]), write_embeddings(tmp_path / "b.h5", ["G3"])]
    vocab = read_gene_vocab(paths, SPECIAL, "[PAD]")
    assert len(vocab) == 10
    assert (vocab.unknown, vocab.pad, vocab.start, vocab.end) == (0, 1, 2, 3)
    assert vocab.lookup(np.array(["G1", "G2", "G3", "G4"])).tolist() == [8, 7, 9, -1]


def test_duplicate_genes_keep_their_first_token(tmp_path: Path) -> None:
    paths = [write_embeddings(tmp_path / "a.h5", ["G1", "G2"]), write_embeddings(tmp_path / "b.h5", ["G1", "G3"])]
    assert read_gene_vocab(paths, SPECIAL, "[PAD]").lookup(np.array(["G1", "G2", "G3"])).tolist() == [7, 8, 9]


def test_special_tokens_are_not_genes() -> None:
    assert GeneVocab(("unknown", "[PAD]"), {"G1": 2}).lookup(np.array(["[PAD]", "unknown"])).tolist() == [-1, -1]


def test_a_missing_special_token_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"special_tokens lacks '\[START\]'"):
        _ = GeneVocab(("unknown", "[PAD]"), {}).start


def test_gene_ids_are_read_without_embeddings(tmp_path: Path) -> None:
    assert read_gene_ids(write_embeddings(tmp_path / "a.h5", ["G1", "G2"])) == ["G1", "G2"]


@pytest.mark.parametrize("content", [None, b"not HDF5"])
def test_a_missing_or_damaged_gene_file_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "human_gene.h5"
    if content:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"human_gene\.h5"):
        read_gene_ids(path)


def test_metadata_outside_the_vocabulary_is_unknown() -> None:
    vocab = AuxVocab("assay", {"unknown": 0, "MERFISH": 3}, unknown=0)
    assert len(vocab) == 4
    for values in (["MERFISH", "new", None], pd.Categorical(["MERFISH", "new", None], categories=["new", "MERFISH"])):
        assert vocab.lookup(pd.Series(values)).tolist() == [3, 0, 0]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"MERFISH": 1}), json.dumps({"unknown": "zero"})])
def test_a_damaged_metadata_vocabulary_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "assay_vocab.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"assay_vocab\.json: (not a JSON object|cannot be parsed as JSON)"):
        read_aux_vocab(path, "assay", "unknown")
