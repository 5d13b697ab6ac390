# Licensed under the Apache License, Version 2.0
"""From statistics to a `PruningPlan`: which atomic experts stay. Nothing here ever sees a model."""
