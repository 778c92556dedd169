"""A fixture that runs a test with every CPU instruction set that was built and that this processor has."""

import pytest

from maskllm.ops.extension import kernels


def _sets() -> list[str]:
    module = kernels()
    return [] if module is None else module.instruction_sets()


@pytest.fixture(params=_sets() or [pytest.param(None, marks=pytest.mark.skip(reason="the kernels were not built"))])
def instruction_set(request):
    """Each instruction set in turn. Afterwards the widest one is in use again."""
    kernels().use_instruction_set(request.param)
    yield request.param
    kernels().use_instruction_set(_sets()[0])
