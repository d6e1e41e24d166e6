"""One value for small batches, another for large ones."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from bigtrain.config import Count
from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class ByBatchRule(SweepRule):
    """One value for small global batches, another for large ones.

    The defaults are those of AdamW's beta2: small batches need an average over more steps.
    """

    name: Literal["by_batch"] = "by_batch"
    small: Positive = 0.99
    """Value for batches of fewer than `from_tokens` tokens."""
    large: Positive = 0.95
    """Value for batches of `from_tokens` tokens or more."""
    from_tokens: Annotated[Count, Ge(1)] = 524_288
    """Tokens of the smallest large batch."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        return self.large if size.batch_tokens >= self.from_tokens else self.small
