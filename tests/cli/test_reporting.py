"""What is printed: nothing that a terminal would act upon, and every error in one line."""

import re
import subprocess
import sys
from pathlib import Path

import anndata
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner, Result

from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import random_adata
from transcriptformer.cli.main import app
from transcriptformer.cli.reporting import plain_errors, printable, say
from transcriptformer.errors import DataError

ESCAPE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e\u2066x\x00"
"""Sets the title, clears the screen, goes back to the start of the line, in two encodings, and turns letters around."""

HOSTILE = ESCAPE.replace("\x00", "") + "\n\u2028ERROR: forged\n"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_plain(text: str) -> None:
    assert text.isascii() or all(letter.isprintable() or letter == "\n" for letter in text), repr(text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text), repr(text)
    assert not re.search(r"^ERROR: forged", text, re.MULTILINE)


def hostile_cells() -> anndata.AnnData:
    adata = random_adata(3)
    adata.obs_names = [f"{HOSTILE}{i}" for i in range(3)]
    adata.obs["assay"] = HOSTILE
    adata.obs[f"column {HOSTILE}"] = HOSTILE
    adata.var[f"var {HOSTILE}"] = HOSTILE
    return adata


def no_gene_column(adata: anndata.AnnData) -> None:
    adata.var = pd.DataFrame({HOSTILE: range(adata.n_vars)}, index=[f"{HOSTILE}{i}" for i in range(adata.n_vars)])


def other_genes(adata: anndata.AnnData) -> None:
    adata.var["ensembl_id"] = [f"{HOSTILE}{i}" for i in range(adata.n_vars)]


def negative_counts(adata: anndata.AnnData) -> None:
    adata.X.data[0] = -1


def nothing(adata: anndata.AnnData) -> None:
    pass


@pytest.mark.parametrize("edit", [nothing, no_gene_column, other_genes, negative_counts])
@pytest.mark.parametrize("command", ["inference", "check"])
def test_nothing_of_a_file_reaches_the_terminal_as_it_is(tmp_path: Path, edit: object, command: str) -> None:
    adata = hostile_cells()
    edit(adata)  # type: ignore[operator]
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    data = ["--data-file", path, "--output-path", tmp_path, "--precision", "32"] if command == "inference" else [path]
    result = invoke(command, "--checkpoint-path", CHECKPOINT, "--device", "cpu", *data)
    assert (result.exit_code == 0) == (edit is nothing), result.output
    assert_plain(result.output)
    assert_plain(result.stderr)


def test_a_missing_column_of_obs_lists_the_others_plainly(tmp_path: Path) -> None:
    hostile_cells().write_h5ad(tmp_path / "cells.h5ad")
    override = ("--config-override", "model.inference_config.obs_keys=[nothing]")
    files = ("--data-file", tmp_path / "cells.h5ad", "--output-path", tmp_path)
    result = invoke("inference", "--checkpoint-path", CHECKPOINT, "--device", "cpu", *files, *override)
    assert result.exit_code == 1
    assert r"\x1b]0;owned\x07\x1b[2J" in result.stderr
    assert_plain(result.stderr)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Größe µ → 细胞 🧬", "Größe µ → 细胞 🧬"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\r\nb\tc", r"a\r\nb\tc"),
        ("\x9b\x85\x7f", r"\x9b\x85\x7f"),
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),
        ("\u2028\ufeff\u200b", r"\u2028\ufeff\u200b"),
        ("\udcff\U000e0041", r"\udcff\U000e0041"),
        (r"C:\x1b", r"C:\x1b"),
    ],
)
def test_what_a_terminal_acts_upon_becomes_an_escape(text: str, plain: str) -> None:
    assert printable(text) == plain


def test_our_own_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("one\ntwo \x1b[1m")
    assert capsys.readouterr().out == "one\ntwo \\x1b[1m\n"


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (DataError("broken\nin two \x1b[1m"), 1, r"ERROR: broken in two \\x1b\[1m"),
        (
            ValueError("an oversight \x1b"),
            1,
            r"ERROR: internal error \(ValueError: an oversight \\x1b\).*--debug.*issues",
        ),
        (MemoryError("74 GiB"), 1, r"ERROR: out of memory \(74 GiB\)"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_every_error_ends_in_one_line(
    error: Exception, exit_code: int, line: str, debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end, plain_errors(debug):
        raise error
    assert end.value.exit_code == exit_code
    *above, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(line, last)
    assert ("Traceback (most recent call last):" in above) == debug
    assert_plain("\n".join(above))


def test_a_broken_pipe_inside_is_an_error_but_a_closed_output_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), plain_errors(False):
        raise BrokenPipeError("a worker is gone")
    assert "internal error (BrokenPipeError: a worker is gone)" in capsys.readouterr().err
    code = "from transcriptformer.cli.reporting import *\nwith plain_errors(False):\n    say('x' * 100_000)"
    command = f'{sys.executable} -c "{code}" | true'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "ClosedOutputError" in done.stderr  # for Typer, which ends the command
    assert "internal error" not in done.stderr


@pytest.mark.parametrize("way_to_end", [typer.Exit(3), typer.Abort(), KeyboardInterrupt(), SystemExit(4)])
def test_other_ways_to_end_are_no_errors(way_to_end: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(way_to_end)), plain_errors(False):
        raise way_to_end
    assert capsys.readouterr().err == ""


def test_json_is_plain(tmp_path: Path) -> None:
    hostile_cells().write_h5ad(tmp_path / "cells.h5ad")
    result = invoke("check", tmp_path / "cells.h5ad", "--checkpoint-path", CHECKPOINT, "--json")
    assert result.exit_code == 0
    assert "owned" in result.stdout
    assert_plain(result.stdout)


def test_training_lists_columns_plainly(tmp_path: Path) -> None:
    hostile_cells().write_h5ad(tmp_path / "cells.h5ad")
    genes = ("--protein-embedding", CHECKPOINT / "vocabs" / "homo_sapiens_gene.h5")
    options = ("--label-column", "nothing", "--output-path", tmp_path / "trained", "--device", "cpu")
    result = invoke("train", "--data-file", tmp_path / "cells.h5ad", *genes, *options)
    assert "--label-column nothing: " in result.stderr.splitlines()[-1]
    assert r"\x1b]0;owned" in result.stderr
    assert_plain(result.stderr)


WARNS = """
import warnings, pandas, anndata
from transcriptformer.cli.reporting import plain_errors
with plain_errors(debug={debug}):
    warnings.simplefilter("always")
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.warn("of a library", category)
    anndata.AnnData(obs=pandas.DataFrame(index=["a", "a"]))
"""


@pytest.mark.parametrize(("debug", "n_shown"), [(False, 0), (True, 4)])
def test_warnings_of_other_packages_are_only_shown_for_debugging(debug: bool, n_shown: int) -> None:
    done = subprocess.run([sys.executable, "-c", WARNS.format(debug=debug)], capture_output=True, text=True, check=True)
    assert len(re.findall(r"^\S+:\d+: \w*Warning: |^.*Warning: Observation", done.stderr, re.MULTILINE)) == n_shown
    assert done.stderr == "" or debug


@pytest.mark.parametrize("kind", ["zarr v2", "repeated names", "csc"])
@pytest.mark.filterwarnings("ignore")
def test_stderr_has_only_our_lines(kind: str, tmp_path: Path) -> None:
    adata, path = random_adata(5), tmp_path / "cells.h5ad"
    if kind == "zarr v2":
        path = tmp_path / "cells.zarr"
        with anndata.settings.override(zarr_write_format=2):
            adata.write_zarr(path)
    else:
        adata.obs_names = ["twice"] * 5
        adata.X = adata.X.tocsc() if kind == "csc" else adata.X
        adata.write_h5ad(path)
    command = [sys.executable, "-W", "always", "-c", "from transcriptformer.cli.main import app; app()", "inference"]
    options = ["--checkpoint-path", CHECKPOINT, "--data-file", path, "--output-path", tmp_path, "--device", "cpu"]
    done = subprocess.run([*command, *map(str, options)], capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if not re.match("(INFO|WARNING): ", line)] == []
