# Licensed under the Apache License, Version 2.0
"""The guides to evaluation and to serving; of the latter what needs no engine."""

from tests.docs.running import pages_run


test_snippets_run = pages_run(
    "docs/source/guides/evaluate.md", "docs/source/guides/serve.md", "docs/source/guides/qwen3_server.md"
)
