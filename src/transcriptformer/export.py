"""A trained model becomes a checkpoint folder in the published layout."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcriptformer.errors import OutputError, one_line
from transcriptformer.model.label_head import LabelHead
from transcriptformer.storage.atomic import atomic_folder
from transcriptformer.train_config import TrainedModel
from transcriptformer.vocab import AuxVocab

BLOCK_LEN = 128
"""Positions of a block in the published package's attention, which is compiled for whole blocks."""

_CLASSES = {
    "data_config": "transcriptformer.data.dataclasses.DataConfig",
    "model_config": "transcriptformer.data.dataclasses.ModelConfig",
    "loss_config": "transcriptformer.data.dataclasses.LossConfig",
}
"""Names that the published package's config.json bears."""

_NOT_PUBLISHED = ("remove_duplicate_genes", "seed", "block_size", "use_raw", "allow_external_links")
"""Settings of ours about how files are read, which the published format does not have."""


def write_checkpoint(
    folder: Path,
    model: TrainedModel,
    gene_files: Sequence[Path],
    aux_vocabs: Mapping[str, AuxVocab],
    weights: Mapping[str, Tensor],
    label_head: LabelHead | None,
) -> None:
    """Write `config.json`, `model_weights.pt`, `vocabs/` and, with a label head, `label_head.pt`.

    The folder gets its name when all of it is there.

    Parameters
    ----------
    gene_files
        Protein-embedding files, to be copied, in the order of the vocabulary.
    weights
        Of the model, by the published names.

    Raises
    ------
    OutputError
        If it cannot be written; nothing is left under the folder's name then.
    """
    try:
        with atomic_folder(folder) as temporary:
            (temporary / "vocabs").mkdir()
            for file in gene_files:
                shutil.copyfile(file, temporary / "vocabs" / file.name)
            for column, vocab in aux_vocabs.items():
                text = json.dumps(vocab.ids, indent=1, ensure_ascii=False)
                (temporary / "vocabs" / f"{column}_vocab.json").write_text(text, encoding="utf-8")
            torch.save(
                {name: weight.detach().cpu().float().contiguous() for name, weight in weights.items()},
                temporary / "model_weights.pt",
            )
            if label_head is not None:
                torch.save(label_head.to_file(), temporary / "label_head.pt")
            text = json.dumps({"model": published_config(model)}, indent=2)
            (temporary / "config.json").write_text(text, encoding="utf-8")
    except RuntimeError as error:  # PyTorch's writer has an error of its own for a full disk
        raise OutputError(f"{folder}: cannot be written ({one_line(error)})") from error


def published_config(model: TrainedModel) -> dict[str, Any]:
    """The sections of `config.json`, with the keys of the published format.

    How counts were scaled, clipped and sorted is said; filters and the shuffling of genes are of the training alone.
    """
    sections = asdict(model)
    data = {key: value for key, value in sections["data_config"].items() if key not in _NOT_PUBLISHED}
    data |= dict.fromkeys(("filter_to_vocabs", "filter_outliers", "min_expressed_genes", "randomize_genes"))
    data |= {"n_data_workers": 1, "pin_memory": True, "pad_zeros": True}
    data |= {"aux_vocab_path": None, "esm2_mappings_path": None, "aux_cols": ",".join(data["aux_cols"]) or None}
    sections["data_config"] = data
    sections["model_config"] |= {"block_len": BLOCK_LEN}
    named = {name: {"_target_": _CLASSES[name], **values} for name, values in sections.items()}
    return {"_target_": "transcriptformer.model.model.Transcriptformer", **named}
