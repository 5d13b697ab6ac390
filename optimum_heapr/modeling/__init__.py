# Licensed under the Apache License, Version 2.0
"""Pruned architectures. Every file here but this one and `auto.py` also travels with pruned checkpoints, for users who
load them with `trust_remote_code=True`: those files import only torch, transformers and one another."""
