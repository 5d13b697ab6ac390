# Licensed under the Apache License, Version 2.0
"""What a newcomer reads first, and the pages that are mostly about the repository."""

from tests.docs.running import pages_run


test_snippets_run = pages_run(
    "README.md",
    "docs/source/index.md",
    "docs/source/installation.md",
    "docs/source/quicktour.md",
    "docs/source/contributing.md",
    "docs/source/performance.md",
    "docs/source/benchmarks.md",
)
