# Licensed under the Apache License, Version 2.0
"""What planning refuses and a search can go on from."""

from __future__ import annotations

from ..utils.errors import HeaprError


class UnreachableRatio(HeaprError):
    """A ratio that the layout, a runtime's rule or protection does not allow.

    Args:
        message (`str`): one line for the user.
        nearest (`float`): the ratios next to it, above and below, that are allowed, if there are any.
    """

    def __init__(self, message: str, *nearest: float):
        super().__init__(message)
        self.nearest = nearest
