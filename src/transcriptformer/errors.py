"""Errors that users can fix; all derive from `TranscriptFormerError`."""


class TranscriptFormerError(Exception):
    """Base class of errors that a user can fix; the message says what is wrong, where, and what to do."""

    exit_code = 1


class UsageError(TranscriptFormerError):
    """Invalid option, override or path."""

    exit_code = 2


class DataError(TranscriptFormerError):
    """Invalid counts, gene ids or cell metadata."""


class CheckpointError(TranscriptFormerError):
    """Incomplete, damaged or unsupported checkpoint folder."""


class OutputError(TranscriptFormerError):
    """Output that cannot be written."""


class DamagedError(OutputError):
    """Missing, truncated or modified intermediate file."""


class TrainingError(TranscriptFormerError):
    """Training that cannot continue."""


class DownloadError(TranscriptFormerError):
    """Failed download, or one whose content does not match its checksum."""


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 200 characters; its type name if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
