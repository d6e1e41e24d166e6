"""One value for all widths, which muP carries: `model.mup` of the base run has the factors."""

from __future__ import annotations

from typing import Literal

from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class MupRule(SweepRule):
    """The learning rate that was tuned at `base.model.mup.base_width`, for all widths (Yang et al. 2022, table 8)."""

    name: Literal["mup"] = "mup"
    value: Positive
    """The quantity."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        if not size.model.get("mup"):
            raise ValueError("the base run has no model.mup: set base.model.mup: {base_width: WIDTH}")
        return self.value
