"""Pictures that commands draw."""

from pathlib import Path
from typing import TYPE_CHECKING

from transcriptformer.errors import UsageError
from transcriptformer.storage.atomic import atomic_write, check_writable

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")


def check_picture(path: Path) -> None:
    """Raise TranscriptFormerError unless a picture can be written to the file of --plot."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: must end in {', '.join(SUFFIXES)}")
    check_writable(path, "--plot")


def save(figure: "Figure", path: Path) -> None:
    """Write a figure in the format of the file's suffix; an existing file stays until then.

    Raises
    ------
    OutputError
        If writing fails.
    """
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format=path.suffix[1:].lower())
