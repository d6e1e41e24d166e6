"""The same value for all sizes."""

from __future__ import annotations

from typing import Literal

from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class ConstantRule(SweepRule):
    """The same value for all sizes."""

    name: Literal["constant"] = "constant"
    value: Positive
    """Value of the quantity."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        return self.value
