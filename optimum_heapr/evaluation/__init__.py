# Licensed under the Apache License, Version 2.0
"""How good a model still is."""
