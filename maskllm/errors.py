"""The exceptions that a user's mistake, or a user's wish to stop, raises."""

from __future__ import annotations


class MaskLLMError(Exception):
    """Bad input: a file, an option or a tensor that cannot be used.

    The message is one line that names the thing, what was found, what was wanted and what to do. The command line prints it
    and exits with `exit_status`.
    """

    exit_status = 1


class StoppedError(MaskLLMError):
    """The run was asked to stop (SIGTERM, SIGINT, SIGHUP); the message says how to go on with it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0].removesuffix(":")


def as_line(error: BaseException) -> str | None:
    """What to tell the user in one line about an error that is not this program's fault; None for others."""
    if isinstance(error, MaskLLMError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror or error}" if error.filename else str(error.strerror or error)
    else:
        return None
    return text.replace("\n", "\\n").replace("\r", "\\r")  # a path may hold line ends
