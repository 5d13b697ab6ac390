# Licensed under the Apache License, Version 2.0
"""Sizes in bytes as people write them."""

import pytest

from optimum_heapr import HeaprError
from optimum_heapr.utils.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("12GB", 12 * 10**9), ("11.5 GiB", 23 * 2**29), ("7kb", 7000), ("1TiB", 2**40), (" 3 MB ", 3_000_000)],
)
def test_sizes(text, size):
    assert parse_size("size", text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "12 GBs", "1e9", "twelve", "0.1", "1,5GB"])
def test_others_are_refused(text):
    with pytest.raises(HeaprError, match="size=.*must be a number of bytes.*12GB"):
        parse_size("size", text)
