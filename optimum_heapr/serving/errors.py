# Licensed under the Apache License, Version 2.0
"""What is refused when a server starts."""


class ServingError(RuntimeError):
    """One line, as with [`HeaprError`]; no `ValueError`, which the checks of vLLM's configuration wrap in lines of their own."""
