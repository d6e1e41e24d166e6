"""What a fit can be asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bigtrain.scaling.bootstrap import REPLICATES
from bigtrain.scaling.objective import DEFAULT_DELTA, LOSS_FUNCTIONS, LossFunction
from bigtrain.scaling.parametric import STARTS
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.selection import Duplicates, Edges, Swept

Approach = Literal["a1", "a2", "a3", "all"]


@dataclass(frozen=True)
class FitOptions:
    """Options of `bigtrain scaling fit`."""

    columns: ColumnNames = field(default_factory=ColumnNames)
    drop_highest: int = 0
    where: str | None = None
    approach: Approach = "all"
    loss_function: LossFunction | None = None
    """None: all three, Huber first."""
    delta: float = DEFAULT_DELTA
    cluster: Literal["auto", "model", "none"] = "auto"
    """What the bootstrap keeps together; auto: the runs of a model where their residuals are alike."""
    target_flops: float | None = None
    """None: ten times the largest run's."""
    equal_exponents: bool = False
    replicates: int = REPLICATES
    seed: int = 0
    processes: int | None = None
    starts: int = STARTS
    """Of the search for approach 3's minimum, beside variable projection."""
    duplicates: Duplicates = "refuse"
    """What is done with two rows that are one run."""
    swept: Swept = "best"
    """Which rows are fitted where learning rates or batches are swept at one (N, D)."""
    edges: Edges = "refuse"
    """What is done where the best of a swept learning rate or batch lies at the edge of its grid."""
    form: str | None = None
    """A law of the user's own, or a name of `forms.NAMED`, fitted beside the approaches and then the first."""
    overlap: str | None = None
    """overlap.json of the held-out data, or their shards; None: that of a sweep's own."""

    @property
    def functions(self) -> tuple[LossFunction, ...]:
        """Those of approach 3, the chosen one first."""
        if self.loss_function is not None:
            return (self.loss_function,)
        return LOSS_FUNCTIONS if self.approach == "all" else ("huber",)
