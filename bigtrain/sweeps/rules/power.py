"""A power of N, kept between two ends."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from bigtrain.config import Count
from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class PowerRule(SweepRule):
    """value * (N / at)^exponent, kept between least and most."""

    name: Literal["power"] = "power"
    value: Positive
    """The quantity at N = at."""
    at: Annotated[Count, Ge(1)] = 108_000_000
    """N at which `value` holds."""
    exponent: float = 0.0
    """How it grows with N; 0: it does not."""
    least: Positive | None = None
    """Lower end; null: none."""
    most: Positive | None = None
    """Upper end; null: none."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        found = self.value * (size.params / self.at) ** self.exponent
        found = found if self.least is None else max(found, self.least)
        return found if self.most is None else min(found, self.most)
