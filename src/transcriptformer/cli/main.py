"""The `transcriptformer` command."""

from typing import Annotated

import typer

from transcriptformer.cli.check import check
from transcriptformer.cli.demo import demo
from transcriptformer.cli.download import download
from transcriptformer.cli.download_data import download_data
from transcriptformer.cli.embed_proteins import embed_proteins
from transcriptformer.cli.generate import generate
from transcriptformer.cli.inference import inference
from transcriptformer.cli.perturb import perturb
from transcriptformer.cli.prompt import prompt
from transcriptformer.cli.score import score
from transcriptformer.cli.train import train

app = typer.Typer(
    help="Embeddings of single cells from their RNA counts, with TranscriptFormer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes cut off long option names on a narrow terminal
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"transcriptformer {version('transcriptformer')}")
        raise typer.Exit()


@app.callback()
def transcriptformer(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Embeddings of single cells from their RNA counts, with TranscriptFormer."""


app.command()(inference)
app.command()(check)
app.command()(score)
app.command()(prompt)
app.command()(perturb)
app.command()(generate)
app.command()(train)
app.command()(download)
app.command()(download_data)
app.command()(demo)
app.command()(embed_proteins)
