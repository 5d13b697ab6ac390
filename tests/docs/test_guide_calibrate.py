# Licensed under the Apache License, Version 2.0
"""The guide to calibration: one process, several, and two hosts."""

from tests.docs.running import pages_run


test_snippets_run = pages_run("docs/source/guides/calibrate.md")
