"""Runs a test on every CPU instruction set that was built and that this processor has, and on the PyTorch reference."""

import pytest

from maskllm.ops.extension import kernels


def _sets() -> list[str]:
    module = kernels()
    return [] if module is None else module.instruction_sets()


@pytest.fixture(params=_sets() or [pytest.param(None, marks=pytest.mark.skip(reason="the kernels were not built"))])
def instruction_set(request):
    """Each instruction set in turn; the widest one is put back."""
    kernels().use_instruction_set(request.param)
    yield request.param
    kernels().use_instruction_set(_sets()[0])
