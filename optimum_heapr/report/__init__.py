# Licensed under the Apache License, Version 2.0
"""What pruning did to a model: one JSON document, and the same as Markdown, as a page, and as tables for a terminal."""
