"""The options of `bigtrain scaling fit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bigtrain.scaling.bootstrap import REPLICATES
from bigtrain.scaling.objective import DEFAULT_DELTA, LOSS_FUNCTIONS, LossFunction
from bigtrain.scaling.parametric import STARTS
from bigtrain.scaling.runs.columns import ColumnNames
from bigtrain.scaling.runs.selection import Duplicates, Edges, Points, Swept

Approach = Literal["a1", "a2", "a3", "all"]


@dataclass(frozen=True)
class FitOptions:
    """Options of `bigtrain scaling fit`."""

    columns: ColumnNames = field(default_factory=ColumnNames)
    """Columns that the user has named."""
    drop_highest: int = 0
    """Number of runs with the highest losses to exclude."""
    where: str | None = None
    """An expression that selects rows; see `runs.where`."""
    approach: Approach = "all"
    loss_function: LossFunction | None = None
    """Loss function of approach 3. None: with approach "all" all three, Huber first; otherwise Huber."""
    delta: float = DEFAULT_DELTA
    """Delta of the Huber loss."""
    cluster: Literal["auto", "model", "none"] = "auto"
    """Clusters of the bootstrap: models, single runs (none), or models only if the residuals of a model's runs are
    alike (auto)."""
    target_flops: float | None = None
    """FLOPs of the target; None: ten times the FLOPs of the largest run."""
    equal_exponents: bool = False
    """Whether approach 3 requires alpha = beta."""
    replicates: int = REPLICATES
    """Number of bootstrap replicates."""
    seed: int = 0
    processes: int | None = None
    """Processes of the bootstrap; see `bootstrap.bootstrap`."""
    starts: int = STARTS
    """Random starts of the search of approach 3, in addition to variable projection."""
    duplicates: Duplicates = "refuse"
    """What to do with two rows that are the same run."""
    swept: Swept = "best"
    """Which rows to fit if learning rates or batches are swept at one (N, D)."""
    edges: Edges = "refuse"
    """What to do if the best of a swept learning rate or batch lies at the edge of its grid."""
    points: Points = "all"
    """Which rows of runs with several rows to fit: all of them, or the last one of each run."""
    form: str | None = None
    """A form of the user's own, or a name in `forms.NAMED`. It is fitted as well, and is then the primary law."""
    overlap: str | None = None
    """overlap.json of the held-out data, or the directory of shards with it; None: that of a sweep's own data."""

    @property
    def functions(self) -> tuple[LossFunction, ...]:
        """The loss functions of approach 3, the primary one first."""
        if self.loss_function is not None:
            return (self.loss_function,)
        return LOSS_FUNCTIONS if self.approach == "all" else ("huber",)
