# Licensed under the Apache License, Version 2.0
"""Sharing pruned models: the card that describes one, and the upload of everything in a single commit."""
