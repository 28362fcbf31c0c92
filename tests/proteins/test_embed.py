"""The command from a FASTA file to a protein-embedding file, and its interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import esm
import h5py
import numpy as np
import psutil
import pytest
from typer.testing import CliRunner, Result

from tests.commands import COMMAND, finish, start
from tests.esm2_models import convert, random_esm2
from tests.golden_cases import CHECKPOINT, SYNTHETIC
from tests.proteins.fasta_files import random_records, write_fasta
from tests.proteins.test_esm2 import by_fair_esm
from tests.web import Web, serve
from transcriptformer.checkpoint.vocabs import read_gene_ids, read_protein_embeddings
from transcriptformer.cli.main import app
from transcriptformer.errors import UsageError
from transcriptformer.proteins.embed import Settings, embed_proteins, plan_batches
from transcriptformer.proteins.ensembl import ADDRESS_VARIABLE
from transcriptformer.proteins.fasta import Protein
from transcriptformer.proteins.isoforms import choose_isoforms
from transcriptformer.storage.results import PIECES
from transcriptformer.storage.sealed import SealedFile

NOWHERE = "http://127.0.0.1:9"
WIDTH = 16  # as the embeddings of the synthetic checkpoint
CELLS = SYNTHETIC / "other_species.h5ad"
GENES = read_gene_ids(SYNTHETIC / "other_species_gene.h5")


@pytest.fixture(scope="module")
def reference() -> esm.ESM2:
    return random_esm2(layers=2, width=WIDTH)


@pytest.fixture(scope="module")
def model(reference: esm.ESM2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(reference, tmp_path_factory.mktemp("embed") / "model")


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proteins of the genes of the synthetic cells, with two isoforms of some, one long protein and unknown letters."""
    records = random_records(GENES)
    records += [(f"{header} isoform:2".replace("P", "Q", 1), sequence[::-1]) for header, sequence in records[:50]]
    records[7] = records[7][0], 30 * "MKVLAGDERWH" + "*J"
    return write_fasta(tmp_path_factory.mktemp("fasta") / "Mus_musculus.GRCm39.pep.all.fa.gz", records)


def command(fasta: Path, model: Path | str, output_dir: Path, *options: object) -> list[str]:
    fixed = ["embed-proteins", "--fasta", fasta, "--model", model, "--output-dir", output_dir, "--device", "cpu"]
    return [str(option) for option in (*fixed, *options)]


def embed(fasta: Path, model: Path | str, output_dir: Path, *options: object) -> Result:
    return CliRunner().invoke(app, command(fasta, model, output_dir, *options))


def result_of(output_dir: Path) -> tuple[list[str], np.ndarray]:
    return read_protein_embeddings([output_dir / "mus_musculus_gene.h5"])


def assert_same_file(one: Path, other: Path) -> None:
    (genes, embeddings), (other_genes, other_embeddings) = result_of(one), result_of(other)
    assert genes == other_genes
    np.testing.assert_array_equal(embeddings, other_embeddings)
    for folder in (one, other):
        assert [path.name for path in folder.iterdir()] == ["mus_musculus_gene.h5"]


def test_genes_have_the_residue_means_of_fair_esm_in_file_order(
    fasta: Path, model: Path, reference: esm.ESM2, tmp_path: Path
) -> None:
    result = embed(fasta, model, tmp_path, "--max-length", 200)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        f"{tmp_path}/mus_musculus_gene.h5: 310 genes, width 16, from 310 proteins (310 different sequences); "
        "1 truncated to 200 residues, 0 letters replaced by <unk>; "
    )
    genes, embeddings = result_of(tmp_path)
    assert genes == GENES
    proteins = [sequence[:200] for _, sequence in random_records(GENES)]
    proteins[7] = (30 * "MKVLAGDERWH")[:200]
    np.testing.assert_allclose(embeddings, by_fair_esm(reference, proteins, 2), rtol=1e-5, atol=1e-5)


def test_the_file_has_the_published_layout(fasta: Path, model: Path, tmp_path: Path) -> None:
    embed(fasta, model, tmp_path)
    with h5py.File(tmp_path / "mus_musculus_gene.h5") as ours, h5py.File(SYNTHETIC / "other_species_gene.h5") as theirs:
        assert ours.keys() == theirs.keys()
        assert ours["keys"].dtype == theirs["keys"].dtype
        np.testing.assert_array_equal(ours["keys"][:], theirs["keys"][:])
        assert ours["arrays"].keys() == theirs["arrays"].keys()
        for gene in GENES:
            assert (ours["arrays"][gene].shape, ours["arrays"][gene].dtype) == ((WIDTH,), theirs["arrays"][gene].dtype)
        made = json.loads(ours.attrs["transcriptformer"])["run"]
    assert (made["fasta"], made["model"]["layer"], made["settings"]["isoforms"]) == (fasta.name, 2, "first")


def test_inference_and_check_accept_the_file_for_a_new_species(fasta: Path, model: Path, tmp_path: Path) -> None:
    embed(fasta, model, tmp_path)
    made = tmp_path / "mus_musculus_gene.h5"
    options = ["--checkpoint-path", CHECKPOINT, "--pretrained-embedding", made, "--precision", "32", "--device", "cpu"]
    arguments = [str(option) for option in options]
    checked = CliRunner().invoke(app, ["check", str(CELLS), "--json", *arguments])
    assert checked.exit_code == 0, checked.output
    (report,) = json.loads(checked.stdout)["files"]
    with h5py.File(CELLS) as file:
        assert (
            report["genes_known"]
            == len(set(GENES) & {gene.decode().partition(".")[0] for gene in file["var/ensembl_id"][:]})
            > 100
        )
    inferred = CliRunner().invoke(
        app, ["inference", "--data-file", str(CELLS), "--output-path", str(tmp_path / "out"), *arguments]
    )
    assert inferred.exit_code == 0, inferred.output
    with h5py.File(tmp_path / "out" / "embeddings.h5ad") as file:
        embeddings = file["obsm/embeddings"][:]
    assert np.isfinite(embeddings).all()
    assert embeddings.std(axis=0).min() > 0


@pytest.mark.parametrize("isoforms", ["longest", "mean"])
def test_isoforms_are_chosen_as_asked(
    isoforms: str, fasta: Path, model: Path, reference: esm.ESM2, tmp_path: Path
) -> None:
    embed(fasta, model, tmp_path, "--isoforms", isoforms)
    _, first = random_records(GENES)[0]
    expected = by_fair_esm(reference, [first, first[::-1]] if isoforms == "mean" else [first], 2).mean(axis=0)
    genes, embeddings = result_of(tmp_path)
    assert genes == GENES
    np.testing.assert_allclose(embeddings[0], expected, rtol=1e-5, atol=1e-5)


def test_the_layer_can_be_chosen(fasta: Path, model: Path, reference: esm.ESM2, tmp_path: Path) -> None:
    embed(fasta, model, tmp_path, "--layer", 1)
    proteins = [sequence for _, sequence in random_records(GENES)[:3]]
    np.testing.assert_allclose(result_of(tmp_path)[1][:3], by_fair_esm(reference, proteins, 1), rtol=1e-5, atol=1e-5)


def test_two_processes_equal_one(fasta: Path, model: Path, tmp_path: Path) -> None:
    one = embed(fasta, model, tmp_path / "one", "--tokens-per-batch", 300)
    two = embed(fasta, model, tmp_path / "two", "--tokens-per-batch", 300, "--num-gpus", 2)
    assert (one.exit_code, two.exit_code) == (0, 0), two.output
    assert_same_file(tmp_path / "one", tmp_path / "two")


def test_batches_hold_every_protein_among_others_of_similar_length() -> None:
    records = random_records((f"G{i}" for i in range(200)), longest=300)
    proteome = choose_isoforms([Protein(header, sequence) for header, sequence in records], "first", 1022)
    batches = plan_batches(proteome, 1000, 1022)
    assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(200))
    assert all([proteome.sequences[row] for row in batch.rows] == batch.sequences for batch in batches)
    sizes = [(len(batch.rows), max(map(len, batch.sequences)) + 2) for batch in batches]
    assert all(n * longest <= 1000 for n, longest in sizes)
    assert sum(n * longest for n, longest in sizes) < 1.1 * sum(len(sequence) + 2 for sequence in proteome.sequences)
    assert [longest for _, longest in sizes] == sorted((longest for _, longest in sizes), reverse=True)


class InterruptedRunError(Exception):
    """Raised to interrupt a run."""


@pytest.fixture
def interrupted(fasta: Path, model: Path, tmp_path: Path) -> Path:
    """A folder with the intermediate results of a run that was interrupted halfway."""

    def interrupt_halfway(n_done: int, n_total: int) -> None:
        if n_done >= n_total / 2:
            raise InterruptedRunError

    output = tmp_path / "out" / "mus_musculus_gene.h5"
    with pytest.raises(InterruptedRunError):
        embed_proteins(fasta, output, Settings(str(model), device="cpu", tokens_per_batch=300), interrupt_halfway)
    assert [path.name for path in output.parent.iterdir()] == ["mus_musculus_gene.h5.parts"]
    return output.parent


def test_a_resumed_run_equals_an_uninterrupted_one(interrupted: Path, fasta: Path, model: Path, tmp_path: Path) -> None:
    resumed = embed(fasta, model, interrupted, "--resume", "--tokens-per-batch", 300)
    assert resumed.exit_code == 0, resumed.output
    assert "of 310 sequences are already done" in resumed.stderr
    assert embed(fasta, model, tmp_path / "uninterrupted", "--tokens-per-batch", 300).exit_code == 0
    assert_same_file(interrupted, tmp_path / "uninterrupted")


def test_a_run_may_resume_with_another_batch_size(interrupted: Path, fasta: Path, model: Path, tmp_path: Path) -> None:
    assert embed(fasta, model, interrupted, "--resume", "--tokens-per-batch", 1000).exit_code == 0
    embed(fasta, model, tmp_path / "uninterrupted")
    np.testing.assert_allclose(
        result_of(interrupted)[1], result_of(tmp_path / "uninterrupted")[1], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("how", ["flipped", "cut", "deleted"])
def test_damaged_results_are_recomputed(how: str, interrupted: Path, fasta: Path, model: Path, tmp_path: Path) -> None:
    piece = pieces_in(interrupted)[0]
    content = piece.read_bytes()
    piece.write_bytes(content[:-3] + bytes([content[-3] ^ 8]) + content[-2:] if how == "flipped" else content[:-50])
    if how == "deleted":
        piece.unlink()
    resumed = embed(fasta, model, interrupted, "--resume", "--tokens-per-batch", 300)
    assert resumed.exit_code == 0, resumed.output
    assert (f"{piece}: truncated" in resumed.stderr) == (how != "deleted")
    embed(fasta, model, tmp_path / "uninterrupted", "--tokens-per-batch", 300)
    assert_same_file(interrupted, tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (["--layer", 1], "model.layer was 2, is 1"),
        (["--isoforms", "mean"], "settings.isoforms was first, is mean"),
        (["--max-length", 50], "settings.max_length was 1022, is 50"),
        (["--precision", "bf16-mixed"], "settings.type of matrix products was torch.float32, is torch.bfloat16"),
    ],
)
def test_resuming_with_changed_settings_is_refused_and_names_the_change(
    options: list[object], change: str, interrupted: Path, fasta: Path, model: Path
) -> None:
    result = embed(fasta, model, interrupted, "--resume", *options)
    assert result.exit_code == 2
    assert change in result.stderr
    assert [path.name for path in interrupted.iterdir()] == ["mus_musculus_gene.h5.parts"]


def test_without_resume_intermediate_results_are_not_overwritten(interrupted: Path, fasta: Path, model: Path) -> None:
    result = embed(fasta, model, interrupted)
    assert result.exit_code == 2
    assert "contains results of an earlier run; add --resume" in result.stderr
    assert [path.name for path in interrupted.iterdir()] == ["mus_musculus_gene.h5.parts"]


def test_a_complete_result_is_not_recomputed(fasta: Path, model: Path, tmp_path: Path) -> None:
    embed(fasta, model, tmp_path)
    before = (tmp_path / "mus_musculus_gene.h5").stat().st_mtime_ns
    result = embed(fasta, model, tmp_path, "--resume")
    assert result.exit_code == 0
    assert "is already complete" in result.stderr
    assert (tmp_path / "mus_musculus_gene.h5").stat().st_mtime_ns == before


@pytest.fixture
def long_run(tmp_path: Path) -> list[str]:
    """Options of a run that takes several seconds."""
    model = convert(random_esm2(layers=6, width=320, heads=20), tmp_path / "larger")
    fasta = write_fasta(tmp_path / "Mus_musculus.fa", random_records(f"G{i:05}" for i in range(1000)))
    return command(fasta, model, tmp_path / "out", "--tokens-per-batch", 1000)


def pieces_in(folder: Path) -> list[Path]:
    """Intermediate results on disk."""
    return list(folder.glob(f"mus_musculus_gene.h5.parts/{PIECES}"))


def rows_kept(folder: Path) -> int:
    """Number of sequences in them."""
    return sum(len(SealedFile(path).read("rows")) for path in pieces_in(folder))


@pytest.mark.slow
def test_a_run_that_is_killed_repeatedly_ends_with_the_file_of_an_uninterrupted_one(
    long_run: list[str], tmp_path: Path
) -> None:
    """The process writes every batch at once, so that every kill can lose something."""
    at_once = "from transcriptformer.storage import results; results.FLUSH_SECONDS = 0"
    code = f"{at_once}; from transcriptformer.cli.main import app; app()"
    eager = [sys.executable, "-c", code, *long_run, "--resume"]
    before = 0
    for _ in range(3):
        process = start(eager)
        while rows_kept(tmp_path / "out") <= before + 50:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        assert finish(process, kill_after=0).returncode == -signal.SIGKILL
        before = rows_kept(tmp_path / "out")
    assert before < 1000
    last = finish(start(eager))
    assert last.returncode == 0, last.stderr
    assert "of 1000 sequences are already done" in last.stderr
    assert_as_uninterrupted(long_run, tmp_path)


def assert_as_uninterrupted(run: list[str], folder: Path) -> None:
    """Compare the output with that of an uninterrupted run."""
    (folder / "out").rename(folder / "interrupted")
    assert finish(start([str(COMMAND), *run])).returncode == 0
    assert_same_file(folder / "interrupted", folder / "out")


def wait_for_both(process: "subprocess.Popen[str]", folder: Path) -> list[psutil.Process]:
    """Return the two worker processes of a run once both have written results."""
    while len({path.name[:11] for path in pieces_in(folder)}) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    return workers


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_which_can_be_resumed(long_run: list[str], tmp_path: Path) -> None:
    process = start([str(COMMAND), *long_run, "--num-gpus", "2"])
    workers = wait_for_both(process, tmp_path / "out")
    workers[0].kill()
    process.wait(60)
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    result = finish(process)
    assert result.returncode == 1
    assert (
        "a worker process was killed or crashed (exit code -9); rerun the same command with --resume to continue"
        in result.stderr
    )
    assert rows_kept(tmp_path / "out") > 0, "the other process has written nothing"
    assert finish(start([str(COMMAND), *long_run, "--resume", "--num-gpus", "2"])).returncode == 0
    assert_as_uninterrupted(long_run, tmp_path)


@pytest.mark.slow
def test_an_error_in_a_worker_is_one_line_and_leaves_no_files(fasta: Path, model: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    os.truncate(damaged / "model.safetensors", 3000)
    result = embed(fasta, damaged, tmp_path / "out", "--num-gpus", 2)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"ERROR: {damaged}: cannot read the weights")
    assert result.stderr.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_workers_write_their_results_and_end_when_the_main_process_dies(long_run: list[str], tmp_path: Path) -> None:
    process = start([str(COMMAND), *long_run, "--num-gpus", "2"])
    workers = wait_for_both(process, tmp_path / "out")
    process.kill()
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    finish(process)
    assert rows_kept(tmp_path / "out") > 0


@pytest.mark.slow
def test_ctrl_c_keeps_computed_sequences(long_run: list[str], tmp_path: Path) -> None:
    process = start([str(COMMAND), *long_run, "--num-gpus", "2"])
    wait_for_both(process, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    result = finish(process)
    assert result.returncode == 130
    assert "sequences are kept in" in result.stderr
    assert "Traceback" not in result.stderr


BAD_FILES = {
    "empty": b"",
    "nucleotides": b">P1 gene:G1\nACGTACGTACGT\n",
    "twice": b">P1 gene:G1\nMKV\n>P1 gene:G1\nMKV\n",
    "truncated": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\x95\x9d",
    "without an id": b">P1\nMKV\n",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_an_invalid_file_is_a_one_line_error_and_nothing_is_written(kind: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "Mus_musculus.fa"
    path.write_bytes(BAD_FILES[kind])
    result = embed(path, model, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"ERROR: {path}: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--layer", 3], "--layer 3: the model has layers 1 to 2"),
        (["--isoforms", "last"], "--isoforms last: not one of first, longest, mean"),
        (["--precision", "16"], "--precision 16: not one of"),
        (["--num-gpus", 0], "--num-gpus 0: must be at least 1, or -1 for all"),
        (["--device", "tpu"], "--device tpu: not available; available devices: cpu"),
        (["--id-from", "gene:("], "--id-from 'gene:(': not a regular expression"),
        (["--organism-key", "homo_sapiens"], "give either --fasta or --organism-key"),
        (["--output-dir", "/dev/null/x"], "--output-dir /dev/null/x: mus_musculus_gene.h5 cannot be written there"),
        (["--model", "no/such/folder"], "--model no/such/folder: no such folder"),
    ],
)
def test_an_invalid_option_is_a_one_line_error(
    options: list[object], reason: str, fasta: Path, model: Path, tmp_path: Path
) -> None:
    result = embed(fasta, model, tmp_path, *options)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_result_can_be_compared_with_another(fasta: Path, model: Path, tmp_path: Path) -> None:
    embed(fasta, model, tmp_path / "first")
    other = tmp_path / "first" / "mus_musculus_gene.h5"
    same = embed(fasta, model, tmp_path / "again", "--compare", other)
    assert same.exit_code == 0, same.output
    similar = "cosine similarities: minimum 1.000000, median 1.000000, mean 1.000000"
    assert same.stdout.splitlines()[1] == f"{other}: 310 genes in common; {similar}"
    mean = embed(fasta, model, tmp_path / "mean", "--isoforms", "mean", "--compare", other)
    values = [float(part.split()[-1]) for part in mean.stdout.splitlines()[1].split(": ")[-1].split(", ")]
    expected = _cosines(result_of(tmp_path / "mean")[1], result_of(tmp_path / "first")[1])
    assert values == pytest.approx([expected.min(), np.median(expected), expected.mean()], abs=1e-6)
    assert values[0] < 1 == values[1]


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(a, b, strict=True)])


def test_a_missing_file_to_compare_with_is_an_error_before_anything_is_computed(
    fasta: Path, model: Path, tmp_path: Path
) -> None:
    result = embed(fasta, model, tmp_path / "out", "--compare", tmp_path / "absent.h5")
    assert result.exit_code == 1
    assert "absent.h5: vocabulary file missing" in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_error_says_how_to_install_it(
    fasta: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = embed(fasta, model, tmp_path)
    assert result.exit_code == 2
    assert 'run: pip install "transcriptformer[proteins]"' in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def hub(model: Path) -> Iterator[Web]:
    """A server that imitates the Hugging Face hub and serves the model."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    described = {"id": "lab/esm2", "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    served = {f"/lab/esm2/resolve/{commit}/{name}": content for name, content in files.items()}
    tree = [{"type": "file", "path": name, "size": len(content), "oid": name} for name, content in files.items()]
    served["/api/models/lab/esm2/revision/main"] = json.dumps(described).encode()
    served[f"/api/models/lab/esm2/tree/{commit}?recursive=true&expand=false"] = json.dumps(tree).encode()
    with serve(Web(served, headers={"X-Repo-Commit": commit})) as web:
        yield web


def test_a_model_is_downloaded_from_the_hub_once_and_a_species_from_ensembl(
    hub: Web, fasta: Path, model: Path, tmp_path: Path
) -> None:
    hub.files["/pub/release-113/fasta/mus_musculus/pep/Mus_musculus.GRCm39.pep.all.fa.gz"] = fasta.read_bytes()
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hub"), ADDRESS_VARIABLE: hub.address}
    fixed = [COMMAND, "embed-proteins", "--organism-key", "mus_musculus", "--model", "lab/esm2", "--device", "cpu"]
    result = finish(start([str(part) for part in (*fixed, "--output-dir", tmp_path / "out")], environment))
    assert result.returncode == 0, result.stderr
    embed(fasta, model, tmp_path / "local")
    np.testing.assert_array_equal(result_of(tmp_path / "out")[1], result_of(tmp_path / "local")[1])

    find = (
        "from transcriptformer.proteins.esm2 import *; print(sorted(p.name for p in find_model('lab/esm2').iterdir()))"
    )
    found = finish(start([sys.executable, "-c", find], {**environment, "HF_ENDPOINT": NOWHERE}))
    assert found.stdout == "['config.json', 'model.safetensors']\n", found.stderr


def test_without_a_network_the_error_says_what_to_download_and_where_to_put_it(fasta: Path, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": NOWHERE, "HF_HOME": str(tmp_path / "hub")}
    published = "facebook/esm2_t36_3B_UR50D"
    result = finish(start([str(COMMAND), *command(fasta, published, tmp_path / "out")], environment))
    assert result.returncode == 1
    assert result.stderr.startswith(
        f"ERROR: --model {published}: no such folder, not in the cache, and cannot be downloaded from http://"
    )
    assert f"`hf download {published} --local-dir esm2_t36_3B_UR50D`" in result.stderr
    assert "copy that folder (config.json and *.safetensors or *.bin) here and pass it to --model" in result.stderr
    assert result.stderr.count("\n") == 1


def test_embed_py_runs_the_command(tmp_path: Path) -> None:
    script = SYNTHETIC.parents[1] / "protein_embeddings" / "embed.py"
    result = finish(start([sys.executable, str(script), "--fasta", str(tmp_path / "absent.fa")]))
    assert (result.returncode, result.stderr) == (1, f"ERROR: {tmp_path}/absent.fa: no such file\n")


def test_settings_are_validated_in_python_too() -> None:
    with pytest.raises(UsageError, match="--isoforms shortest: not one of"):
        Settings(isoforms="shortest")
