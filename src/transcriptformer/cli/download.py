"""`transcriptformer download`: weights and protein embeddings."""

from pathlib import Path
from typing import Annotated

import typer

from transcriptformer.cli.options import Debug, MaxRetries, option


def download(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="tf-sapiens, tf-exemplar, tf-metazoa, all-embeddings or all."),
    ],
    checkpoint_dir: Annotated[
        Path, option("Parent folder of the downloaded checkpoints.", metavar="DIR", default="checkpoints")
    ] = Path("checkpoints"),
    bucket: Annotated[
        str | None,
        option("S3 bucket; AWS_ENDPOINT_URL_S3 sets the endpoint.", metavar="NAME", default="czi-transcriptformer"),
    ] = None,
    force: Annotated[bool, option("Download again and overwrite.", "--force")] = False,
    connections: Annotated[int, option("Parallel connections per file.", metavar="INT", default=8, min=1)] = 8,
    max_retries: MaxRetries = 5,
    debug: Debug = False,
) -> None:
    """Download weights and protein embeddings.

    An interrupted download continues when the command is run again.
    """
    from transcriptformer.cli.reporting import ByteProgress, plain_errors, resumable, say

    with plain_errors(debug), resumable():
        from transcriptformer.fetching.fetcher import Fetcher
        from transcriptformer.fetching.weights import BUCKET, parse_artifacts
        from transcriptformer.fetching.weights import download as download_artifact

        for name in parse_artifacts(models):
            with ByteProgress() as progress:
                fetcher = Fetcher(max_retries, connections, progress.advance, progress.resumed)
                folder = download_artifact(name, checkpoint_dir, fetcher, bucket or BUCKET, force, progress.expect)
            say(f"{folder}: {_describe(folder)}")


def _describe(folder: Path) -> str:
    """Describe a downloaded folder, which is loaded as `inference` would load it."""
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
