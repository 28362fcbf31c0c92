"""Residue means equal those of fair-esm."""

import shutil
from pathlib import Path

import esm
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from tests.esm2_models import LAYERS, WIDTH, convert, random_esm2
from transcriptformer.errors import CheckpointError, TranscriptFormerError, UsageError
from transcriptformer.proteins.alphabet import LETTERS, N_TOKENS, UNK, tokenize
from transcriptformer.proteins.esm2 import Esm2, choose_layer, find_model, read_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference() -> esm.ESM2:
    return random_esm2()


@pytest.fixture(scope="module")
def folder(reference: esm.ESM2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(reference, tmp_path_factory.mktemp("esm2") / "model")


def random_proteins(lengths: list[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), n)) for n in lengths]


def by_fair_esm(model: esm.ESM2, proteins: list[str], layer: int) -> np.ndarray:
    """Embed one protein at a time as in fair-esm's README, with letters outside the alphabet written as `<unk>`."""
    batch_converter = model.alphabet.get_batch_converter()
    means = []
    for residues in proteins:
        written = "".join(letter if letter in LETTERS else "<unk>" for letter in residues)
        _, _, tokens = batch_converter([("", written)])
        with torch.inference_mode():
            states = model(tokens, repr_layers=[layer])["representations"][layer]
        means.append(states[0, 1 : len(residues) + 1].mean(0).numpy())
    return np.stack(means)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_alphabet_is_that_of_fair_esm(reference: esm.ESM2) -> None:
    alphabet = reference.alphabet
    assert len(alphabet) == N_TOKENS
    for letter in [*LETTERS, "J", "*", "1"]:
        expected = [alphabet.cls_idx, alphabet.get_idx(letter), alphabet.eos_idx]
        np.testing.assert_array_equal(tokenize(letter), expected)
    assert tokenize("*")[1] == UNK == alphabet.unk_idx


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
def test_residue_means_equal_fair_esm_at_every_layer(reference: esm.ESM2, folder: Path, layer: int) -> None:
    proteins = random_proteins([50, 7, 1, 33])  # all but the first are padded
    ours = Esm2(folder, layer, "32", CPU).residue_means(proteins)
    assert ours.shape == (4, WIDTH)
    assert_close(ours, by_fair_esm(reference, proteins, layer))


def test_the_final_norm_applies_to_the_last_layer_only(reference: esm.ESM2, folder: Path) -> None:
    proteins = random_proteins([20])
    with torch.inference_mode():
        tokens = torch.from_numpy(tokenize(proteins[0]))[None]
        states = reference(tokens, repr_layers=[LAYERS])["representations"][LAYERS]
        assert torch.allclose(reference.emb_layer_norm_after(states), states, atol=0.1) is False
    means = [Esm2(folder, layer, "32", CPU).residue_means(proteins) for layer in (LAYERS - 1, LAYERS)]
    assert np.abs(means[0] - means[1]).max() > 0.1


@pytest.mark.parametrize("layer", [2, LAYERS])
def test_unknown_letters_are_unk_as_for_fair_esm(reference: esm.ESM2, folder: Path, layer: int) -> None:
    proteins = ["MKV*LAJJ*", "M*", "***", "XBUZO.-MK", "MÄK"]
    ours = Esm2(folder, layer, "32", CPU).residue_means(proteins)
    assert_close(ours, by_fair_esm(reference, proteins, layer))


@pytest.mark.parametrize("layer", [2, LAYERS])
def test_the_longest_proteins_equal_fair_esm(reference: esm.ESM2, folder: Path, layer: int) -> None:
    proteins = random_proteins([1022, 300, 1022])
    ours = Esm2(folder, layer, "32", CPU).residue_means(proteins)
    assert_close(ours, by_fair_esm(reference, proteins, layer))


def test_the_rotary_frequencies_of_a_checkpoint_are_used(reference: esm.ESM2, folder: Path, tmp_path: Path) -> None:
    """They may have been rounded when they were saved."""
    rounded = random_esm2()
    for block in rounded.layers:
        block.self_attn.rot_emb.inv_freq = block.self_attn.rot_emb.inv_freq.bfloat16().float()
    proteins = random_proteins([1000])
    there = convert(rounded, tmp_path / "rounded")
    means = Esm2(there, LAYERS, "32", CPU).residue_means(proteins)
    assert_close(means, by_fair_esm(rounded, proteins, LAYERS))
    assert np.abs(means - by_fair_esm(reference, proteins, LAYERS)).max() > 1e-3


def test_an_embedding_does_not_depend_on_the_rest_of_the_batch(folder: Path) -> None:
    model = Esm2(folder, 2, "32", CPU)
    proteins = random_proteins([5, 200, 60])
    together = model.residue_means(proteins)
    for protein, mean in zip(proteins, together, strict=True):
        np.testing.assert_allclose(model.residue_means([protein])[0], mean, rtol=1e-5, atol=1e-6)


def test_half_precision_is_close(folder: Path) -> None:
    proteins = random_proteins([100, 30])
    exact, rough = (Esm2(folder, 2, precision, CPU).residue_means(proteins) for precision in ("32", "bf16-mixed"))
    assert rough.dtype == np.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05


class LittleMemory(Esm2):
    """A device that runs out of memory above so many tokens."""

    room = 100
    n_refused = 0

    def _residue_means(self, sequences: list[str]) -> np.ndarray:  # type: ignore[override]
        if len(sequences) * (max(map(len, sequences)) + 2) > self.room:
            self.n_refused += 1
            raise torch.OutOfMemoryError("no more")
        return super()._residue_means(sequences)


def test_a_batch_that_does_not_fit_is_halved_and_so_are_later_ones(folder: Path) -> None:
    proteins = random_proteins([18] * 12)
    model = LittleMemory(folder, 2, "32", CPU)
    expected = Esm2(folder, 2, "32", CPU).residue_means(proteins)
    np.testing.assert_allclose(model.residue_means(proteins), expected, rtol=1e-5, atol=1e-6)
    refused = model.n_refused
    model.residue_means(proteins)
    assert model.n_refused == refused == 2


def test_a_single_protein_that_does_not_fit_is_an_error(folder: Path) -> None:
    with pytest.raises(TranscriptFormerError, match="single protein of 202 tokens; use another device"):
        LittleMemory(folder, 2, "32", CPU).residue_means(random_proteins([200]))


def test_the_published_layer_is_chosen_for_the_published_model(folder: Path) -> None:
    config = read_config(folder)
    assert choose_layer(config, None) == LAYERS
    config.num_hidden_layers = 36
    assert choose_layer(config, None) == 33
    config.num_hidden_layers = 48
    assert choose_layer(config, None) == 48
    assert choose_layer(config, 12) == 12
    for layer in (0, 49, -1):
        with pytest.raises(UsageError, match="the model has layers 1 to 48"):
            choose_layer(config, layer)


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


def test_missing_weights_are_an_error_rather_than_random(damaged: Path) -> None:
    weights = load_file(damaged / "model.safetensors")
    del weights["esm.encoder.layer.1.LayerNorm.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing weights: (esm\.)?encoder\.layer\.1\.LayerNorm\.weight"):
        Esm2(damaged, 2, "32", CPU)


def test_truncated_weights_are_an_error(damaged: Path) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged: cannot read the weights"):
        Esm2(damaged, 2, "32", CPU)


def test_a_folder_without_weights_or_configuration_is_refused(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: no weights \("):
        read_config(damaged)
    (damaged / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is missing or damaged"):
        read_config(damaged)


def test_another_kind_of_model_is_refused(damaged: Path) -> None:
    BertConfig().save_pretrained(damaged)
    with pytest.raises(CheckpointError, match="not an ESM-2 model, but of type 'bert'"):
        read_config(damaged)


def test_pytorch_weights_are_read(reference: esm.ESM2, damaged: Path) -> None:
    torch.save(load_file(damaged / "model.safetensors"), damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    proteins = random_proteins([20])
    read_config(damaged)
    assert_close(Esm2(damaged, 2, "32", CPU).residue_means(proteins), by_fair_esm(reference, proteins, 2))


@pytest.mark.parametrize("name", ["./esm2", "/models/esm2", "esm2", "a/b/c"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_model(name)
