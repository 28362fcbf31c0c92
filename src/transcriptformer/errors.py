"""What can go wrong for a user: every such error derives from `TranscriptFormerError`."""


class TranscriptFormerError(Exception):
    """Something the user can put right; the message says what, where and how."""

    exit_code = 1


class UsageError(TranscriptFormerError):
    """An option, an override or a path that cannot be used."""

    exit_code = 2


class DataError(TranscriptFormerError):
    """Counts, gene ids or cell metadata that cannot be used."""


class CheckpointError(TranscriptFormerError):
    """A checkpoint folder that is incomplete, damaged or of another kind."""


class OutputError(TranscriptFormerError):
    """A result that cannot be written where it should go."""


class DamagedError(OutputError):
    """A kept file that is missing, truncated or altered."""


class TrainingError(TranscriptFormerError):
    """Training that cannot go on."""


class DownloadError(TranscriptFormerError):
    """Something that cannot be fetched, or is not what it should be."""


def one_line(error: BaseException) -> str:
    """The message of an error, shortened to one line, or its kind where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
