# Licensed under the Apache License, Version 2.0
"""Concepts, and the guides to what comes before and after pruning."""

from tests.docs.running import pages_run


test_snippets_run = pages_run(
    "docs/source/concepts/allocation.md",
    "docs/source/concepts/criteria.md",
    "docs/source/concepts/layouts.md",
    "docs/source/guides/after_pruning.md",
    "docs/source/guides/choose_ratio.md",
    "docs/source/guides/large_models.md",
    "docs/source/guides/quantized.md",
    "docs/source/guides/report.md",
)
