"""Imports point one way, and what people start often starts fast."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.golden_cases import CELLS, CHECKPOINT

SRC = Path(__file__).parents[1] / "src" / "transcriptformer"

LAYERS = [
    ("errors", "config", "vocab"),
    ("runtime", "storage", "fetching"),
    ("data", "model"),
    ("checkpoint",),
    ("runs",),
    ("inference", "training", "proteins", "generation"),
    ("api", "demo"),
    ("cli",),
]
"""Lower layers first; a module imports from its own wing, and from what stands before that."""

STRANGERS = [{"data", "model"}, {"inference", "training", "proteins", "generation"}]
"""Wings of one layer that know nothing of each other."""

AT_THE_ROOT = {"__init__.py", "api.py", "config.py", "errors.py", "vocab.py", "py.typed"}


def imports_of(path: Path) -> set[str]:
    """Wings and modules of our package that a module imports, by their first name."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("transcriptformer.")}


def wrong_imports(package: Path) -> Iterator[str]:
    """Imports that point the wrong way."""
    order = [part for layer in LAYERS for part in layer]
    for path in sorted(package.rglob("*.py")):
        wing = path.relative_to(package).with_suffix("").parts[0]
        if wing == "__init__":  # what the package offers comes from everywhere, when it is asked for
            continue
        for imported in sorted(imports_of(path)):
            is_stranger = imported != wing and any({wing, imported} <= strangers for strangers in STRANGERS)
            if order.index(imported) > order.index(wing) or is_stranger:
                yield f"{path.relative_to(package)} imports {imported}"


def test_imports_point_one_way() -> None:
    assert list(wrong_imports(SRC)) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("config", "storage.atomic"),
        ("storage/atomic", "fetching.fetcher"),
        ("data/batches", "checkpoint.load"),
        ("data/batches", "model.layers"),
        ("model/layers", "data.batches"),
        ("checkpoint/load", "runs.run"),
        ("runs/run", "inference.run"),
        ("training/run", "inference.run"),
        ("inference/run", "training.run"),
        ("proteins/embed", "inference.run"),
        ("generation/prompts", "inference.run"),
        ("inference/run", "generation.prompts"),
        ("checkpoint/load", "generation.prompts"),
        ("inference/run", "api"),
        ("demo/run", "cli.reporting"),
    ],
)
def test_an_import_that_points_the_wrong_way_is_noticed(module: str, imported: str, tmp_path: Path) -> None:
    package = tmp_path / "transcriptformer"
    shutil.copytree(SRC, package, ignore=shutil.ignore_patterns("__pycache__", "checkpoint/*.pt"))
    with (package / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(f"\nimport transcriptformer.{imported}\n")
    assert list(wrong_imports(package)) == [f"{module}.py imports {imported.split('.')[0]}"]


def test_nothing_else_stands_at_the_root() -> None:
    assert {path.name for path in SRC.iterdir() if path.is_file()} <= AT_THE_ROOT


def test_the_command_line_and_the_package_start_without_torch() -> None:
    code = """
import sys, transcriptformer, transcriptformer.cli.main
heavy = {"torch", "pytorch_lightning", "anndata", "scanpy", "pandas", "hydra", "numpy"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_embedding_needs_no_lightning() -> None:
    """Its import takes longer than embedding some hundred cells."""
    code = f"""
import sys, transcriptformer.proteins.embed, transcriptformer as tf
tf.embed({str(CELLS)!r}, tf.load({str(CHECKPOINT)!r}, device="cpu"))
heavy = {{"pytorch_lightning", "lightning_fabric", "torchmetrics", "torch._dynamo", "sklearn"}} & sys.modules.keys()
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_downloading_needs_no_torch() -> None:
    code = """
import sys, transcriptformer.fetching.weights, transcriptformer.data.bulk_download, transcriptformer.data.census
import transcriptformer.proteins.ensembl
sys.exit("imported: torch" if "torch" in sys.modules else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
