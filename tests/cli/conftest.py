"""Running a verb that must fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from maskllm.cli import main


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Call it to run `maskllm ARGV`, which must fail with one line; it returns the line."""

    def run(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"maskllm {argv[0]}: error: ")
        return line

    return run
