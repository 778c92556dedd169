"""The open draw: which forward passes use it, and what activation recomputation remembers of it."""

from __future__ import annotations

import pytest

from maskllm.masking.draw import Draw, current_draw, keep_draw, open_draw


def test_a_forward_pass_without_an_open_draw_is_refused():
    with pytest.raises(
        RuntimeError, match=r"no draw of masks is open; run the forward pass inside of maskllm\.masking\.draw\.open_draw"
    ):
        current_draw()
    with open_draw(Draw(3)):
        pass
    with pytest.raises(RuntimeError, match="no draw of masks is open"):
        current_draw()


def test_an_inner_draw_ends_with_its_block_even_after_an_error():
    with open_draw(Draw(3)):
        with pytest.raises(ZeroDivisionError), open_draw(Draw(4)):
            assert current_draw() == Draw(4)
            raise ZeroDivisionError
        assert current_draw() == Draw(3)


def test_a_recomputed_function_runs_in_the_draw_it_was_wrapped_in():
    """Under a pipeline schedule another micro-batch's draw is open when the function is repeated, or none."""
    with open_draw(Draw(3)):
        kept = keep_draw(lambda value: (value, current_draw()))
        assert kept(1) == (1, Draw(3))
    with open_draw(Draw(4)):
        assert kept(2) == (2, Draw(3, recomputing=True))
        assert current_draw() == Draw(4)
    assert kept(value=3) == (3, Draw(3, recomputing=True))


def test_a_function_that_is_wrapped_while_it_is_recomputed_counts_as_recomputing():
    with open_draw(Draw(3)):
        outer = keep_draw(lambda: keep_draw(current_draw)())
        assert outer() == Draw(3)
        assert outer() == Draw(3, recomputing=True)


def test_without_an_open_draw_the_function_stays_itself():
    def function() -> None:
        pass

    assert keep_draw(function) is function
