"""Values of auxiliary columns that stand for entries of the vocabulary: other spellings and ontology terms."""

import pickle
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.data.test_batches import make_readers
from tests.h5ad_files import make_adata
from transcriptformer.data.assays import ASSAY_OF_TERM
from transcriptformer.data.aux_names import AuxNames
from transcriptformer.data.reader import CellReader
from transcriptformer.vocab import AuxVocab

ASSAY = AuxVocab("assay", {"unknown": 0, "10x 3' v3": 1, "Drop-seq": 2, "MERFISH": 3, "CEL-Seq": 4}, unknown=0)
TERM = "assay_ontology_term_id"


def reader_of(columns: dict[str, Any], vocab: AuxVocab = ASSAY) -> CellReader:
    n = len(next(iter(columns.values())))
    adata = make_adata(np.ones((n, 3)))
    adata.obs = pd.DataFrame(columns, index=adata.obs_names)
    return make_readers(adata, aux_vocabs={vocab.column: vocab})[0]


def tokens_of(columns: dict[str, Any], vocab: AuxVocab = ASSAY) -> list[int]:
    reader = reader_of(columns, vocab)
    return [int(token) for token in reader.aux_tokens(0, len(reader))[:, 0]]


def test_terms_and_names_are_well_formed_and_unique() -> None:
    assert all(re.fullmatch(r"EFO:\d{7}", term) for term in ASSAY_OF_TERM)
    assert len(set(ASSAY_OF_TERM.values())) == len(ASSAY_OF_TERM)


@pytest.mark.parametrize(
    "value",
    [
        *("10x 3' v3", "10X 3' v3", "10x 3’ v3", " 10x  3′ V3 ", "10x\u00a03' v3"),  # noqa: RUF001
        *("EFO:0009922", "efo:0009922 ", "EFO_0009922", "http://www.ebi.ac.uk/efo/EFO_0009922"),
    ],
)
def test_spellings_and_terms_stand_for_the_name(value: str) -> None:
    assert AuxNames(ASSAY).find(value) == "10x 3' v3"


@pytest.mark.parametrize("value", ["EFO:0008679", "cel‑seq", "CEL–SEQ"])  # noqa: RUF001
def test_names_of_terms_and_dashes_may_be_spelled_otherwise(value: str) -> None:
    assert AuxNames(ASSAY).find(value) == "CEL-Seq"


@pytest.mark.parametrize("value", ["10x 3' v9", "EFO:0008931", "EFO:1", "", "3", "10x 3' v3 and more"])
def test_other_values_stand_for_themselves(value: str) -> None:
    assert AuxNames(ASSAY).find(value) == value


def test_a_spelling_of_several_entries_is_unknown_but_each_is_itself() -> None:
    names = AuxNames(AuxVocab("assay", {"unknown": 0, "A": 1, "a": 2}, unknown=0))
    assert [names.find(value) for value in ("A", "a", " a")] == ["A", "a", " a"]


def test_terms_only_stand_for_assays() -> None:
    tissue = AuxVocab("tissue", {"unknown": 0, "10x 3' v3": 1}, unknown=0)
    assert AuxNames(tissue).find("EFO:0009922") == "EFO:0009922"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"assay": ["EFO:0009922", "Drop-seq"]}, [1, 2]),
        ({TERM: ["EFO:0009922", "EFO:0008722"]}, [1, 2]),
        ({"assay": ["new", "Drop-seq"], TERM: ["EFO:0009922", "EFO:0008992"]}, [1, 2]),
        ({"assay": [None, "unknown"], TERM: ["EFO:0009922", "EFO:0008992"]}, [1, 3]),
        ({"assay": pd.Categorical(["new", None]), TERM: pd.Categorical([None, "EFO:0008992"])}, [0, 3]),
        ({"assay": [np.nan, np.nan], TERM: ["EFO:1", None]}, [0, 0]),
        ({"assay": [3, 4]}, [0, 0]),
        ({"other": ["MERFISH", "MERFISH"]}, [0, 0]),
    ],
)
def test_terms_stand_in_for_unknown_values_cell_by_cell(columns: dict[str, Any], expected: list[int]) -> None:
    assert tokens_of(columns) == expected


def test_any_column_may_have_terms_beside_it() -> None:
    tissue = AuxVocab("tissue", {"unknown": 0, "lung": 1, "UBERON:0000955": 2}, unknown=0)
    columns = {"tissue": ["Lung", "brain"], "tissue_ontology_term_id": ["UBERON:0002048", "UBERON:0000955"]}
    assert tokens_of(columns, tissue) == [1, 2]


def test_what_was_taken_is_logged_once_and_returned(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    values = ["EFO:0009922", "EFO:0009922", "DROP-SEQ", "MERFISH", "10x 3' v4", "EFO:0008931", None]
    reader = pickle.loads(pickle.dumps(reader_of({"assay": values})))
    reader.log_aux_values()
    assert reader.aux_names_taken() == {"assay": {"EFO:0009922": "10x 3' v3", "DROP-SEQ": "Drop-seq"}}
    messages = [record.getMessage().removeprefix("the AnnData: ") for record in caplog.records]
    assert messages[:2] == ["assay 'EFO:0009922' taken as \"10x 3' v3\"", "assay 'DROP-SEQ' taken as 'Drop-seq'"]
    assert messages[2:] == [
        "unknown assay: \"10x 3' v4\" (1 cells, nearest known: \"10x 3' v3\"), 'EFO:0008931' ('Smart-seq2', 1 cells)"
    ]
    assert reader.aux_values["assay"].unknown == {"10x 3' v4": 1, "EFO:0008931": 1, None: 1}


def test_exact_names_are_not_logged_and_their_terms_are_not_read(caplog: pytest.LogCaptureFixture) -> None:
    reader = reader_of({"assay": ["MERFISH", "unknown"], TERM: ["EFO:0009922", "EFO:9999999"]})
    assert reader.aux_tokens(0, 1).tolist() == [[3]]
    reader.log_aux_values()
    assert reader.aux_names_taken() == {}
    assert caplog.text == ""
