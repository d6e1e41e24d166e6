"""A user's sweep rule: a quantity that grows with the root of the batch."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from bigtrain.config import Count
from bigtrain.sweeps.config import RULES, SizeFacts, SweepRule


@RULES.register
class RootBatchRule(SweepRule):
    """value * sqrt(batch / at), both in tokens (Malladi et al. 2022)."""

    name: Literal["root-batch"] = "root-batch"
    value: Annotated[float, Gt(0)]
    """The quantity for a batch of `at` tokens."""
    at: Annotated[Count, Ge(1)] = 65_536
    """Tokens of a batch."""

    def of(self, size: SizeFacts) -> float:
        return self.value * (size.batch_tokens / self.at) ** 0.5
