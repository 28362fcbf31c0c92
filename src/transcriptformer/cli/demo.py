"""`transcriptformer demo`: a small model that comes with the package, on cells that come with scanpy."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output_path: Annotated[Path, typer.Option(metavar="DIR", help="Folder of what comes out.")] = Path("demo_results"),
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Embed 700 blood cells with a small model, draw them, and classify those it has not seen."""
    from transcriptformer.cli.reporting import CountProgress, plain_errors, say

    with plain_errors(debug):
        from transcriptformer.demo.run import run_demo

        with CountProgress("cells") as progress:
            made = run_demo(output_path, progress.update)
        say(f"{made.n_held_out} held-out cells, classified by their nearest neighbours among the others:")
        say("                                  accuracy  macro-F1")
        for name, score in (("embeddings", made.score), ("PCA of log-normalized counts", made.pca_score)):
            say(f"  {name:<30}  {score.accuracy:8.3f}  {score.macro_f1:8.3f}")
        say(f"{made.embeddings}\n{made.picture}")
