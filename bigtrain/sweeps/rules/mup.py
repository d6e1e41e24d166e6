"""One learning rate for all widths, for base runs with muP (`model.mup`), which scales it by parameter."""

from __future__ import annotations

from typing import Literal

from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class MupRule(SweepRule):
    """Use the learning rate tuned at `base.model.mup.base_width` for all widths (Yang et al. 2022, table 8)."""

    name: Literal["mup"] = "mup"
    value: Positive
    """The value for all sizes."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        if not size.model.get("mup"):
            raise ValueError("the base run has no model.mup: set base.model.mup: {base_width: WIDTH}")
        return self.value
