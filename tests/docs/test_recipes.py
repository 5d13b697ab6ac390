# Licensed under the Apache License, Version 2.0
"""The recipes, for the models that they are of and the commands that use them."""

from tests.docs.running import pages_run


test_snippets_run = pages_run(
    "recipes/deepseek-moe-16b-base/README.md",
    "recipes/demo/README.md",
    "recipes/moe-a/README.md",
    "recipes/qwen1.5-moe-a2.7b-chat/README.md",
    "recipes/qwen2-57b-a14b/README.md",
    "recipes/qwen3-30b-a3b/README.md",
    "recipes/stdlib-moe/README.md",
)
