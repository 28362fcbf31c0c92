"""Build the model to train, from scratch or from a checkpoint: new vocabulary entries, LoRA and frozen modules."""

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from transcriptformer.checkpoint import vocabs
from transcriptformer.checkpoint.load import (
    WEIGHTS,
    check_values,
    new_model,
    read_label_head,
    read_vocabs,
    read_weights,
)
from transcriptformer.errors import UsageError
from transcriptformer.model.label_head import LabelHead
from transcriptformer.model.lora import LoraLinear, add_lora
from transcriptformer.model.transcriptformer import TranscriptFormer
from transcriptformer.training.config import MEAN, TrainConfig
from transcriptformer.training.corpus import Corpus
from transcriptformer.vocab import AuxVocab, GeneVocab, make_aux_vocab, make_gene_vocab

logger = logging.getLogger(__name__)

NEW_AUX_STD = 0.02
"""Standard deviation of the initial embeddings of metadata values, from scratch."""


@dataclass(frozen=True)
class StartingPoint:
    """A model that is ready to be trained.

    Attributes
    ----------
    model, label_head
        Modules in training mode; frozen parameters require no gradients. `label_head` is None if no labels are
        learned.
    gene_vocab, aux_vocabs
        Vocabularies of the model.
    gene_files
        Protein-embedding files of the vocabulary.
    labels
        Label of every cell of the corpus (cells,), int64; empty if no labels are learned.
    """

    model: TranscriptFormer
    label_head: LabelHead | None
    gene_vocab: GeneVocab
    aux_vocabs: dict[str, AuxVocab]
    gene_files: list[Path]
    labels: np.ndarray


def prepare(config: TrainConfig, corpus: Corpus) -> StartingPoint:
    """Build the model of a configuration, with weights that depend on the seed only.

    Raises
    ------
    TranscriptFormerError
        If the checkpoint, a protein-embedding file or a name is invalid.
    """
    training = config.training
    torch.manual_seed(training.seed)
    if training.checkpoint_path is None:
        model, gene_vocab, aux_vocabs, gene_files = _from_scratch(config, corpus)
        known_head = None
    else:
        folder = Path(training.checkpoint_path)
        model, gene_vocab, aux_vocabs, gene_files = _from_checkpoint(config, folder)
        known_head = read_label_head(folder, config.model.model_config.embed_dim)
    labels, label_head = np.zeros(0, np.int64), None
    if known_head is not None and training.label_column is None:
        logger.warning("the checkpoint's label head for %r is dropped: no --label-column", known_head.column)
    if training.label_column is not None:
        if known_head is not None and known_head.column == training.label_column:
            label_head = known_head
        labels, names = corpus.labels(training.label_column, None if label_head is None else label_head.labels)
        if label_head is None:
            label_head = LabelHead(training.label_column, names, config.model.model_config.embed_dim)
        label_head.train().requires_grad_(True)
    if training.lora_rank:
        add_lora(model, training.lora_rank, training.lora_alpha)
    freeze(model, config)
    return StartingPoint(model.train(), label_head, gene_vocab, aux_vocabs, gene_files, labels)


def read_gene_vocab(config: TrainConfig) -> GeneVocab:
    """Read the gene vocabulary of a configuration, without protein embeddings or weights."""
    data, training = config.model.data_config, config.training
    if training.checkpoint_path is not None:
        return read_vocabs(Path(training.checkpoint_path), config.model)[0]
    files = [Path(file) for file in training.protein_embeddings]
    return vocabs.read_gene_vocab(files, data.special_tokens, data.gene_pad_token, data.allow_external_links)


_Start = tuple[TranscriptFormer, GeneVocab, dict[str, AuxVocab], list[Path]]


def _from_scratch(config: TrainConfig, corpus: Corpus) -> _Start:
    data, files = config.model.data_config, [Path(file) for file in config.training.protein_embeddings]
    genes, rows = vocabs.read_protein_embeddings(files, data.allow_external_links)
    gene_vocab = make_gene_vocab(genes, data.special_tokens, data.gene_pad_token)
    aux_vocabs = {column: make_aux_vocab(column, corpus.values(column), data.aux_pad_token) for column in data.aux_cols}
    model = TranscriptFormer(
        config.model.model_config, config.model.loss_config, gene_vocab, aux_vocabs, protein_dim=rows.shape[1]
    )
    with torch.no_grad():
        special = torch.randn(len(gene_vocab.special_tokens), rows.shape[1]) * float(rows.std())
        model.gene_embeddings.embedding.weight.copy_(torch.cat([special, torch.from_numpy(rows)]))
        for embedding in model.aux_embeddings.values():
            embedding.weight.normal_(std=NEW_AUX_STD)  # type: ignore[operator]
        model.mu.gene_embedding.weight.zero_()
    return model, gene_vocab, aux_vocabs, files


def _from_checkpoint(config: TrainConfig, folder: Path) -> _Start:
    gene_vocab, aux_vocabs = read_vocabs(folder, config.model)
    path = folder / WEIGHTS
    weights = read_weights(path)
    model = new_model(config.model, gene_vocab, aux_vocabs, weights, path)
    check_values(path)
    # The file is memory-mapped, and the weights change.
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name != "gene_embeddings.embedding.weight")
    for column, values in config.training.new_aux_values.items():
        aux_vocabs[column] = add_aux_values(model, aux_vocabs[column], values)
    model.unknown_aux = [vocab.unknown for vocab in aux_vocabs.values()]
    files = [folder / "vocabs" / name for name in config.model.data_config.esm2_mappings]
    return model, gene_vocab, aux_vocabs, files


def add_aux_values(model: TranscriptFormer, vocab: AuxVocab, values: Mapping[str, str]) -> AuxVocab:
    """Append `values` to a vocabulary, each mapped to the known value whose embedding it starts from, or `mean`.

    Raises
    ------
    UsageError
        If a value is already in the vocabulary, or the value to start from is not.
    """
    embedding = model.aux_embeddings[vocab.column].weight.detach()  # type: ignore[operator]
    known = [i for value, i in vocab.ids.items() if i != vocab.unknown]
    ids, rows = dict(vocab.ids), [embedding]
    for value, like in values.items():
        if value in vocab.ids:
            raise UsageError(f"--new-assay {value}: already in the checkpoint's vocabulary of {vocab.column}")
        if like != MEAN and like not in vocab.ids:
            close = difflib.get_close_matches(like, vocab.ids, n=1, cutoff=0)
            raise UsageError(
                f"--new-assay {value}={like}: {like!r} is not in the checkpoint's vocabulary of {vocab.column}; "
                f"did you mean {close[0]!r}? Use {MEAN} to start from the mean of all"
            )
        row = embedding[known].mean(0) if like == MEAN and known else embedding[vocab.ids.get(like, vocab.unknown)]
        ids[value] = max(ids.values()) + 1
        rows.append(row[None])
    weight = torch.cat(rows)
    model.aux_embeddings[vocab.column] = nn.Embedding(len(weight), weight.shape[1], _weight=weight)
    return AuxVocab(vocab.column, ids, vocab.unknown)


def freeze(model: TranscriptFormer, config: TrainConfig) -> None:
    """Freeze the named modules, heads whose loss has weight 0 and, with LoRA, all pretrained modules.

    Raises
    ------
    UsageError
        If a module does not exist.
    """
    training, modules = config.training, dict(model.named_modules())
    names = list(
        training.freeze if training.freeze is not None else _pretrained_modules(training.lora_rank > 0, config)
    )
    for name in names:
        if not name or name not in modules:
            close = difflib.get_close_matches(name, modules, n=1, cutoff=0)
            top_level = ", ".join(name for name, _ in model.named_children())
            raise UsageError(
                f"--freeze {name}: no such module; did you mean {close[0]}? Top-level modules: {top_level}"
            )
        modules[name].requires_grad_(False)
    count_loss, _ = config.other_loss_weights
    if count_loss == 0:
        model.mu.requires_grad_(False)
    if config.gene_loss_weight == 0 and model.gene_id_head is not None:
        model.gene_id_head.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_a.requires_grad_(True)
            module.lora_b.requires_grad_(True)


def _pretrained_modules(with_lora: bool, config: TrainConfig) -> Sequence[str]:
    if not with_lora:
        return []
    has_gene_head = config.model.loss_config.gene_id_loss_weight > 0
    modules = ["gene_embeddings", "transformer_encoder", "mu", *(["gene_id_head"] if has_gene_head else [])]
    return modules if config.training.new_aux_values else [*modules, "aux_embeddings"]


def count_parameters(*modules: nn.Module | None) -> tuple[int, int]:
    """Return the number of trainable parameters and of all parameters."""
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
