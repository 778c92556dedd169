"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from maskllm.reporting.formatting import format_bytes, format_perplexity, format_ratio, format_seconds, format_share


@pytest.mark.parametrize(
    "found, wanted",
    [
        (format_perplexity(99.996), "100.0"),
        (format_perplexity(math.inf), "inf"),
        (format_ratio(0.9999), "1.00"),
        (format_share(0.00049), "0.0%"),
        (format_seconds(0.4), "0.40 s"),
        (format_seconds(59.97), "1 min 00 s"),
        (format_seconds(3599.7), "1 h 00 min"),
        (format_seconds(7380), "2 h 03 min"),
        (format_bytes(231 * 2**20), "231 MiB"),
        (format_seconds(None), "-"),
    ],
)
def test_numbers_are_rounded_before_their_unit_is_chosen(found, wanted):
    assert found == wanted
