# Licensed under the Apache License, Version 2.0
"""From a model and a plan to a pruned model."""
