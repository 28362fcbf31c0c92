"""Writing a trained model as a checkpoint folder in the published layout."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from transcriptformer.checkpoint.load import LABEL_HEAD, WEIGHTS
from transcriptformer.checkpoint.published import published_config
from transcriptformer.config import TrainedModel
from transcriptformer.errors import OutputError, one_line
from transcriptformer.model.label_head import LabelHead
from transcriptformer.storage.atomic import atomic_folder
from transcriptformer.vocab import AuxVocab


def write_checkpoint(
    folder: Path,
    model: TrainedModel,
    gene_files: Sequence[Path],
    aux_vocabs: Mapping[str, AuxVocab],
    weights: Mapping[str, Tensor],
    label_head: LabelHead | None,
) -> None:
    """Write `config.json`, `model_weights.pt`, `vocabs/` and, with a label head, `label_head.pt`.

    The folder appears only when it is complete.

    Parameters
    ----------
    gene_files
        Protein-embedding files to copy, in vocabulary order.
    weights
        Weights of the model by their published names.

    Raises
    ------
    OutputError
        If the folder cannot be written; no partial folder is left behind.
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
                temporary / WEIGHTS,
            )
            if label_head is not None:
                torch.save(label_head.to_file(), temporary / LABEL_HEAD)
            text = json.dumps({"model": published_config(model)}, indent=2)
            (temporary / "config.json").write_text(text, encoding="utf-8")
    except RuntimeError as error:  # what torch.save raises when the disk is full
        raise OutputError(f"{folder}: cannot be written ({one_line(error)})") from error
