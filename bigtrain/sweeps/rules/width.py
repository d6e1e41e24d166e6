"""A power of the width: hyperparameters that are tuned on a narrow model and carried to wide ones."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class WidthRule(SweepRule):
    """value * (width / at)^exponent: the learning rate of hidden matrices under Adam by default (Yang et al. 2022,
    table 3)."""

    name: Literal["width"] = "width"
    value: Positive
    """The quantity at width = at."""
    at: Annotated[int, Ge(1)] = 256
    """Width at which `value` was tuned."""
    exponent: float = -1.0
    """How it grows with the width; -0.5 for the standard deviation of initial weights."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        width = size.model.get("width")
        if not isinstance(width, int):
            raise ValueError("the size has no key model.width")
        return self.value * (width / self.at) ** self.exponent
