"""One value for small batches, another for large ones."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from bigtrain.config import Count
from bigtrain.sweeps.config import RULES, Positive, SizeFacts, SweepRule


@RULES.register
class ByBatchRule(SweepRule):
    """By the tokens of a batch; the defaults are AdamW's beta2: small batches want a longer memory."""

    name: Literal["by_batch"] = "by_batch"
    small: Positive = 0.99
    """For batches of fewer than `from_tokens` tokens."""
    large: Positive = 0.95
    """For larger ones."""
    from_tokens: Annotated[Count, Ge(1)] = 524_288
    """Where the large batches begin."""

    def of(self, size: SizeFacts) -> float:
        """See `SweepRule.of`."""
        return self.large if size.batch_tokens >= self.from_tokens else self.small
