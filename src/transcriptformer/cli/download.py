"""`transcriptformer download`: weights and protein embeddings."""

from pathlib import Path
from typing import Annotated

import typer


def download(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL", help="tf-sapiens, tf-exemplar, tf-metazoa, all-embeddings (protein embeddings), or all."
        ),
    ],
    checkpoint_dir: Annotated[Path, typer.Option(metavar="DIR", help="Folder of their folders.")] = Path("checkpoints"),
    bucket: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="S3 bucket; AWS_ENDPOINT_URL_S3 names another service.",
            show_default="czi-transcriptformer",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch again what is there, and replace it.")] = False,
    connections: Annotated[int, typer.Option(metavar="INT", min=1, help="By which a file is fetched at once.")] = 8,
    max_retries: Annotated[
        int, typer.Option(metavar="INT", min=0, help="Tries in a row that may fail, after the first.")
    ] = 5,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Download weights and protein embeddings.

    What was fetched when a run ended is kept: the same command goes on from there.
    """
    from transcriptformer.cli.reporting import ByteProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable():
        from transcriptformer.fetching.fetcher import Fetcher
        from transcriptformer.fetching.weights import BUCKET, artifacts_of
        from transcriptformer.fetching.weights import download as download_artifact

        for name in artifacts_of(models):
            with ByteProgress() as progress:
                fetcher = Fetcher(max_retries, connections, progress.advance, progress.found)
                folder = download_artifact(name, checkpoint_dir, fetcher, bucket or BUCKET, force, progress.expect)
            say(f"{folder}: {_describe(folder)}")


def _describe(folder: Path) -> str:
    """What is in a folder that has come, opened as `inference` would open it."""
    from transcriptformer.checkpoint.published import load_config
    from transcriptformer.checkpoint.vocabs import read_gene_ids

    if not (folder / "config.json").exists():
        files = sorted(folder.rglob("*.h5"))
        return f"protein embeddings of {len(files)} species: " + ", ".join(
            f"{_species(path)} ({len(read_gene_ids(path)):,} genes)" for path in files
        )
    from transcriptformer.checkpoint.load import load_checkpoint

    settings = {"model.inference_config.precision": "32", "model.inference_config.device": "cpu"}
    config = load_config(folder, settings)
    checkpoint = load_checkpoint(folder, config)
    species = ", ".join(_species(Path(name)) for name in config.model.data_config.esm2_mappings)
    return (
        f"{config.model.model_config.num_layers} layers of width {checkpoint.width}, "
        f"{len(checkpoint.gene_vocab.genes):,} genes of {species}"
    )


def _species(path: Path) -> str:
    return path.stem.removesuffix("_gene").replace("_", " ")
