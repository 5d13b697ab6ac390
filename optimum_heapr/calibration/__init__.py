# Licensed under the Apache License, Version 2.0
"""From a model and text to `AtomicStatistics`: one forward and one activation-only backward a micro-batch."""
