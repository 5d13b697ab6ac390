# Licensed under the Apache License, Version 2.0
"""Checkpoints in and out: loading, cutting from file to file, writing, and what stands beside the weights."""
