"""A power of the width, for hyperparameters that are tuned on a narrow model and transferred to wide ones."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class WidthRule(SweepRule):
    """The quantity value * (width / at)^exponent.

    The default exponent is that of the learning rate of hidden matrices under Adam (Yang et al. 2022, table 3).
    """

    name: Literal["width"] = "width"
    value: Positive
    """Value of the quantity at width = at."""
    at: Annotated[int, Ge(1)] = 256
    """Width at which `value` was tuned."""
    exponent: float = -1.0
    """Exponent of the width; use -0.5 for the standard deviation of initial weights."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        width = size.model.get("width")
        if not isinstance(width, int):
            raise ValueError("the size has no key model.width")
        return self.value * (width / self.at) ** self.exponent
