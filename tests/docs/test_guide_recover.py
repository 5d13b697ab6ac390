# Licensed under the Apache License, Version 2.0
"""The guide to recovery."""

from tests.docs.running import pages_run


test_snippets_run = pages_run("docs/source/guides/recover.md")
