"""The exceptions for a user's mistake and a user's wish to stop, and how error messages are worded."""

from __future__ import annotations


class MaskLLMError(Exception):
    """Bad input: a file, an option or a tensor that cannot be used.

    The message is one line. It names the thing, what was found, what was wanted and what to do. The command line prints it and exits
    with `exit_status`.
    """

    exit_status = 1


class StoppedError(MaskLLMError):
    """The run was asked to stop (SIGTERM, SIGINT, SIGHUP). The message says how to continue it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to retry"


def flag(name: str) -> str:
    """The command-line spelling of a field: `train_iters` is `--train-iters`."""
    return "--" + name.replace("_", "-")


def first_line(error: BaseException, *, with_type: bool = True) -> str:
    """The first line of an exception's message, after the name of its type. Without a message it is the name alone."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    return f"{name}: {lines[0]}" if with_type else lines[0]


def whole_message(error: BaseException) -> str:
    """An exception's whole message on one line; without a message, the name of its type.

    For the errors of libraries, whose first line is often only a title: "Class validation error:".
    """
    return " ".join(str(error).split()) or type(error).__name__


def as_line(error: BaseException) -> str | None:
    """One line for the user about an error that is not this program's fault; None for any other error."""
    if isinstance(error, MaskLLMError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror or error}" if error.filename else str(error.strerror or error)
    else:
        return None
    return text.replace("\n", "\\n").replace("\r", "\\r")  # a path may contain line ends
