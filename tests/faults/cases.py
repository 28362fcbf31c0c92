"""Commands for fault injection, and readers of their results."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import h5py
import numpy as np
import zarr
from botocore.config import Config
from moto.server import ThreadedMotoServer

from tests.archives import pack
from tests.esm2_models import convert, random_esm2
from tests.golden_cases import CHECKPOINT
from tests.h5ad_files import GENES, random_adata
from tests.proteins.fasta_files import random_records, write_fasta
from tests.training.training_runs import GENE_FILE, losses, weights, write_cells, write_recipe
from tests.web import Web, serve
from transcriptformer.proteins.ensembl import ADDRESS_VARIABLE, fasta_source

CONSTANTS = {
    "transcriptformer.storage.results.FLUSH_BYTES": 0,
    "transcriptformer.runs.pooling.FLUSH_SECONDS": 0.0,
    "transcriptformer.inference.embeddings.BLOCK_BYTES": 2**9,
    "transcriptformer.data.row_stream.CHUNK_BYTES": 2**9,
    "transcriptformer.fetching.fetcher.FLUSH_BYTES": 2**14,
}
"""Make these small runs save results and write the final file in several steps."""

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes
    ----------
    arguments
        Command-line arguments, given an output folder.
    result
        Name of the result in that folder.
    read
        Reads the arrays of a result by name; fails if the result is incomplete.
    leaves
        Names that may be next to the finished result.
    resume_options
        Options with which the same command resumes.
    environment
        Environment variables to set.
    """

    arguments: Callable[[Path], list[object]]
    result: str
    read: Callable[[Path], Arrays]
    leaves: frozenset[str] = frozenset()
    resume_options: tuple[str, ...] = ("--resume",)
    environment: Mapping[str, str] = field(default_factory=dict)


INFERENCE: dict[str, tuple[str, ...]] = {
    "cell": (),
    "cge": ("--emb-type", "cge"),
    "pooled cge": ("--emb-type", "cge", "--cge-pool", "gene"),
    "llh": ("--config-override", "model.inference_config.output_keys=[embeddings,llh]"),
    "zarr": ("--output-filename", "embeddings.zarr"),
}
"""Kinds of results of `inference`, and their options."""

NAMES = (*INFERENCE, "train", "download", "embed-proteins")

EVERY = {"cge": 2, "llh": 4, "train": 4, "embed-proteins": 2, "zarr": 16}
"""Commands for which, by default, only every n-th call fails."""


@contextmanager
def case_named(name: str, folder: Path) -> Iterator[Case]:
    """Create a command with its inputs in `folder`, and start the server it needs."""
    with ExitStack() as stack:
        if name in INFERENCE:
            yield _inference(folder, INFERENCE[name])
        elif name == "train":
            yield _train(folder)
        elif name == "download":
            yield stack.enter_context(_download(folder))
        else:
            yield stack.enter_context(_embed_proteins(folder))


def _inference(folder: Path, options: tuple[str, ...]) -> Case:
    random_adata(8, n_genes=20).write_h5ad(folder / "cells.h5ad")
    fixed = ["inference", "--checkpoint-path", CHECKPOINT, "--data-file", folder / "cells.h5ad", *options]
    fixed += ["--precision", "32", "--device", "cpu", "--batch-size", 3]
    result = "embeddings.zarr" if "embeddings.zarr" in options else "embeddings.h5ad"
    return Case(lambda out: [*fixed, "--output-path", out], result, read_anndata)


def _train(folder: Path) -> Case:
    cells, recipe = write_cells(folder / "cells.h5ad", n_cells=20), write_recipe(folder / "recipe.yaml")
    fixed = ["train", "--config", recipe, "--data-file", cells, "--protein-embedding", GENE_FILE]
    fixed += ["--max-epochs", 1, "--config-override", "training.save_every=1"]
    fixed += ["--config-override", "model.model_config.num_layers=1"]
    leaves = frozenset({"config.yaml", "metrics.csv", "loss.png", "state"})
    return Case(lambda out: [*fixed, "--output-path", out], "checkpoint", _read_training, leaves)


def _read_training(path: Path) -> Arrays:
    found: dict[str, np.ndarray] = {name: weight.numpy() for name, weight in weights(path.parent).items()}
    found |= {name: content for name, content in read_files(path).items() if not name.endswith(".pt")}
    return found | {"metrics.csv": losses(path.parent)}


@contextmanager
def _download(folder: Path) -> Iterator[Case]:
    archive = pack(CHECKPOINT, folder / "tf_sapiens.tar.gz", "tf_sapiens")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        login = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        config = Config(request_checksum_calculation="when_required")
        client = boto3.client("s3", endpoint_url=address, config=config, **login)
        client.create_bucket(Bucket="a-mirror")
        key = f"weights/{archive.name}"
        client.put_object(Bucket="a-mirror", Key=key, Body=archive.read_bytes(), ACL="public-read")
        client.close()
        fixed = ["download", "tf-sapiens", "--bucket", "a-mirror", "--connections", 1, "--checkpoint-dir"]
        yield Case(
            lambda out: [*fixed, out],
            "tf_sapiens",
            read_files,
            frozenset({".tf_sapiens.lock"}),
            resume_options=(),
            environment={"AWS_ENDPOINT_URL_S3": address},
        )
    finally:
        server.stop()


@contextmanager
def _embed_proteins(folder: Path) -> Iterator[Case]:
    model = convert(random_esm2(layers=2, width=16), folder / "model")
    fasta = write_fasta(folder / "proteins.fa.gz", random_records(GENES[:12]))
    source = fasta_source("mus_musculus")
    path = source.url.partition("/pub/")[2]
    fixed = ["embed-proteins", "--organism-key", "mus_musculus", "--model", model, "--device", "cpu"]
    fixed += ["--tokens-per-batch", 100, "--output-dir"]
    with serve(Web({f"/pub/{path}": fasta.read_bytes()})) as web:
        yield Case(
            lambda out: [*fixed, out],
            "mus_musculus_gene.h5",
            read_hdf5,
            frozenset({source.filename, f".{source.filename}.lock"}),
            environment={ADDRESS_VARIABLE: web.address},
        )


def read_anndata(path: Path) -> Arrays:
    """Read all arrays and attributes of a result except its provenance, which names the folder."""
    found = _read_tree(zarr.open_group(path, mode="r")) if path.is_dir() else read_hdf5(path)
    assert any(name.startswith("uns/transcriptformer/") for name in found)
    return {name: value for name, value in found.items() if not name.startswith("uns/transcriptformer")}


def read_hdf5(path: Path) -> Arrays:
    """Read all arrays and attributes of an HDF5 file."""
    with h5py.File(path) as file:
        return _read_tree(file)


def _read_tree(group: Any, prefix: str = "") -> dict[str, np.ndarray]:
    found = {f"{prefix}@{name}": np.asarray(value) for name, value in group.attrs.items()}
    for name in group:
        item, path = group[name], f"{prefix}{name}"
        if hasattr(item, "shape"):
            found[path] = np.asarray(item[()])
            found |= {f"{path}@{key}": np.asarray(value) for key, value in item.attrs.items()}
        else:
            found |= _read_tree(item, f"{path}/")
    return found


def read_files(path: Path) -> Arrays:
    """Read the bytes of all files in a folder, except download dates."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    if "download.json" in files:
        record = json.loads(files["download.json"])
        del record["date"]
        files["download.json"] = json.dumps(record).encode()
    return {name: np.frombuffer(content, np.uint8) for name, content in files.items()}
