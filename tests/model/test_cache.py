"""States computed gene by gene, with a key-value cache, equal those of the whole cell."""

import pytest
import torch
from torch import Tensor

from tests.golden_cases import CELLS, CHECKPOINT, TOLERANCE
from transcriptformer.checkpoint.load import load_checkpoint
from transcriptformer.checkpoint.published import load_config
from transcriptformer.config import LossConfig, ModelConfig
from transcriptformer.data.batches import BatchLimits, make_batches
from transcriptformer.data.reader import CellReader
from transcriptformer.data.source import open_source
from transcriptformer.model.attention.definition import plain_attention
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.vocab import make_aux_vocab, make_gene_vocab

SPECIAL = ("unknown", "[PAD]", "[START]", "[END]")
N_GENES, SEQ_LEN, UNKNOWN = 30, 24, 0


def random_model(n_aux: int, softcap: float) -> TranscriptFormer:
    """A tiny model with random weights, whose attention is the definition."""
    torch.manual_seed(n_aux)
    config = ModelConfig(
        num_layers=3, num_heads=2, embed_dim=8, model_dim=12, seq_len=SEQ_LEN, aux_len=n_aux, softcap=softcap
    )
    genes = make_gene_vocab([f"gene {i}" for i in range(N_GENES)], SPECIAL, "[PAD]")
    aux = {f"column {i}": make_aux_vocab(f"column {i}", ["a", "b"], "unknown") for i in range(n_aux)}
    model = TranscriptFormer(config, LossConfig(), genes, aux, protein_dim=6).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.transformer_encoder.attention = plain_attention
    return model


def random_cells(n_aux: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Genes, counts and auxiliary tokens, the first of which are unknown."""
    genes = torch.full((len(lengths), max(lengths) + 1), SPECIAL.index("[PAD]"))
    for row, length in zip(genes, lengths, strict=True):
        row[:length] = len(SPECIAL) + torch.randperm(N_GENES)[:length]
    counts = torch.randint(1, 20, genes.shape) * (genes >= len(SPECIAL)).float()
    aux = torch.randint(0, 3, (len(lengths), n_aux))
    aux[0] = UNKNOWN
    return genes, counts, aux


@pytest.mark.parametrize("softcap", [0.0, 10.0, 100.0])
@pytest.mark.parametrize("n_aux", [0, 1, 2])
def test_every_step_equals_the_forward_of_the_whole_cell(n_aux: int, softcap: float) -> None:
    model = random_model(n_aux, softcap)
    genes, counts, aux = random_cells(n_aux, [20, 20, 20])
    expected = model(genes, counts, aux).hidden
    cache, states = model.begin(aux, 20)
    torch.testing.assert_close(states, expected[:, :1], atol=TOLERANCE, rtol=0)
    for start, stop in [(0, 1), (1, 2), (2, 7), (7, 17), (17, 18), (18, 20)]:  # one gene, and several
        states = model.extend(cache, genes[:, start:stop], counts[:, start:stop])
        torch.testing.assert_close(states, expected[:, start + 1 : stop + 1], atol=TOLERANCE, rtol=0)
    assert cache.length == n_aux + 1 + 20


def test_cells_of_different_length_grow_together() -> None:
    """Where a cell has no further gene it gets [PAD], which none of its later genes sees."""
    model = random_model(1, 10.0)
    lengths = [9, 4, 1, 0]
    genes, counts, aux = random_cells(1, [length + 6 for length in lengths])
    expected = model(genes, counts, aux).hidden
    cells, pad = torch.arange(len(lengths)), SPECIAL.index("[PAD]")
    has_gene = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    cache, _ = model.begin(aux, max(lengths) + 6)
    prompts = genes[:, : max(lengths)].masked_fill(~has_gene, pad), counts[:, : max(lengths)] * has_gene
    states = model.extend(cache, *prompts)
    torch.testing.assert_close(states[has_gene], expected[:, 1 : max(lengths) + 1][has_gene], atol=TOLERANCE, rtol=0)
    for step in range(6):
        place = torch.tensor(lengths) + step
        states = model.extend(cache, genes[cells, place, None], counts[cells, place, None])
        torch.testing.assert_close(states[:, 0], expected[cells, place + 1], atol=TOLERANCE, rtol=0)


def test_golden_checkpoint() -> None:
    config = load_config(
        CHECKPOINT, {f"model.inference_config.{k}": v for k, v in {"precision": "32", "device": "cpu"}.items()}
    )
    checkpoint = load_checkpoint(CHECKPOINT, config)
    model, vocab, seq_len = checkpoint.model, checkpoint.gene_vocab, config.model.model_config.seq_len
    assert isinstance(model, TranscriptFormer)
    source = open_source(CELLS, config.model.data_config, vocab)
    reader = CellReader(source, vocab, checkpoint.aux_vocabs, config.model.data_config, seq_len)
    cells = torch.arange(len(source)).numpy()
    batch = next(make_batches(reader.block(0, cells, cells), BatchLimits(100, 2**20), vocab.pad, seq_len))
    expected = model(batch.gene_tokens, batch.gene_counts, batch.aux_tokens)
    cache, states = model.begin(batch.aux_tokens, seq_len)
    for j in range(seq_len):
        at = expected.is_input[:, j]
        torch.testing.assert_close(states[at, 0], expected.hidden[at, j], atol=TOLERANCE, rtol=0)
        states = model.extend(cache, batch.gene_tokens[:, j : j + 1], batch.gene_counts[:, j : j + 1])
