"""A power of N, clamped between a minimum and a maximum."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from bigtrain.config import Count
from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class PowerRule(SweepRule):
    """The quantity value * (N / at)^exponent, clamped between `least` and `most`."""

    name: Literal["power"] = "power"
    value: Positive
    """Value of the quantity at N = at."""
    at: Annotated[Count, Ge(1)] = 108_000_000
    """N at which the quantity is `value`."""
    exponent: float = 0.0
    """Exponent of N; 0: the quantity is the same for all sizes."""
    least: Positive | None = None
    """Minimum of the quantity; null: no minimum."""
    most: Positive | None = None
    """Maximum of the quantity; null: no maximum."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        found = self.value * (size.params / self.at) ** self.exponent
        found = found if self.least is None else max(found, self.least)
        return found if self.most is None else min(found, self.most)
