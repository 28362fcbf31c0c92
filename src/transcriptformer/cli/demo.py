"""`transcriptformer demo`: a small model that comes with the package, on cells that come with scanpy."""

from pathlib import Path
from typing import Annotated

from transcriptformer.cli.options import Debug, option

DEFAULT = "demo_results"


def demo(
    output_path: Annotated[Path, option("Output folder.", metavar="DIR", default=DEFAULT)] = Path(DEFAULT),
    debug: Debug = False,
) -> None:
    """Embed 700 blood cells with a small model, plot them and classify held-out cells."""
    from transcriptformer.cli.reporting import CountProgress, plain_errors, say

    with plain_errors(debug):
        from transcriptformer.demo.run import run_demo

        with CountProgress("cells") as progress:
            made = run_demo(output_path, progress.update)
        say(f"{made.n_held_out} held-out cells, classified by their nearest neighbors among the training cells:")
        say("                                  accuracy  macro-F1")
        for name, score in (("embeddings", made.score), ("PCA of log-normalized counts", made.pca_score)):
            say(f"  {name:<30}  {score.accuracy:8.3f}  {score.macro_f1:8.3f}")
        say(f"{made.embeddings}\n{made.picture}")
