"""Imports point one way, and what people start often starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "transcriptformer"

LAYERS = [
    {"errors"},
    {"runtime"},
    {"isolated"},
    {"external"},
    {"checkpoint_files", "storage"},
    {"config", "vocab", "device", "fetch"},
    {"train_config"},
    {"http_file", "s3_object", "unpack"},
    {"download"},
    {"data", "model"},
    {"checkpoint", "lightning"},
    {"trainer"},
    {"row_stream", "output", "pooling", "recording", "batching", "distributed"},
    {"inputs", "corpus", "baseline", "export", "metrics", "training_folder", "training_module"},
    {"file_run", "starting_point", "training_data", "saving"},
    {"inference", "check", "training", "proteins"},
    {"api", "demo"},
    {"cli"},
]
"""Lower layers first; a module imports from its own layer or below, but `data` and `model` never from each other."""


def imports_of(path: Path) -> set[str]:
    """Parts of our package that a module imports, by their first name."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("transcriptformer.")}


def test_imports_point_one_way() -> None:
    height = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    for path in SRC.rglob("*.py"):
        part = path.relative_to(SRC).with_suffix("").parts[0]
        if part == "__init__":
            continue
        for imported in imports_of(path):
            assert height[imported] <= height[part], f"{path} imports {imported}"
            assert {part, imported} != {"data", "model"}, f"{path} imports {imported}"


def test_the_command_line_and_the_package_start_without_torch() -> None:
    code = """
import sys, transcriptformer, transcriptformer.cli.main
heavy = {"torch", "pytorch_lightning", "anndata", "scanpy", "pandas", "hydra", "numpy"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_downloading_needs_no_torch() -> None:
    code = """
import sys, transcriptformer.download, transcriptformer.data.bulk_download, transcriptformer.data.census
import transcriptformer.proteins.ensembl
sys.exit("imported: torch" if "torch" in sys.modules else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
