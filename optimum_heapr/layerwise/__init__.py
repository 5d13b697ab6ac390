# Licensed under the Apache License, Version 2.0
"""One decoder layer at a time: the layers of a model, its weights piece by piece, and micro-batches on their way."""
