# Licensed under the Apache License, Version 2.0
"""vLLM serves pruned models of variable widths: a plugin that vLLM finds by itself once both are installed."""
