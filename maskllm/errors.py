"""The one exception a user's mistake raises."""


class MaskLLMError(Exception):
    """Bad input: a file, an option or a tensor that cannot be used.

    The message is one line that names the thing, what was found, what was wanted and what to do. The command line prints it
    and exits with status 1; nothing else of the program catches it.
    """
