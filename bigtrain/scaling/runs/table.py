"""The table of runs that every fit reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.law import FloatArray
from bigtrain.storage import hash_text

SAME_SIZE = 1.01
"""Ratio of two sizes below which they are the same model, if no column names the models."""
SHOWN = 5
"""Largest number of rows that a message lists."""
MIN_CURVE = 4
"""Least number of points of a training curve."""


@dataclass(frozen=True)
class RunTable:
    """Finished runs, or points of their training curves, one per row; all columns have the same length n."""

    run: tuple[str, ...]
    """Names of the runs."""
    group: tuple[str, ...]
    """The model of each row; a model can be a cluster of the bootstrap."""
    params: FloatArray
    """N as the law counts it, shape (n,)."""
    tokens: FloatArray
    """D, shape (n,)."""
    flops: FloatArray
    """FLOPs of the source, or 6 N D if it gives none, shape (n,)."""
    loss: FloatArray
    """Losses in nats per token, shape (n,)."""
    phase: tuple[str, ...] = ()
    """Phase of the schedule of each row ("decayed", "stable"); empty if the source has no such column."""
    seed: tuple[str, ...] = ()
    lr: FloatArray | None = None
    """Learning rate at the peak; NaN for a row that has none."""
    batch: FloatArray | None = None
    """Batch size, in the unit of the source."""
    unique_tokens: FloatArray | None = None
    """Number of unique tokens of the data that a run may repeat; None if not known."""
    bad: tuple[str, ...] = ()
    """The first cell of each row that is not a number ("'NA' in column 'loss'"); empty if there is none."""
    params_without_embeddings: FloatArray | None = None
    place: tuple[str, ...] = ()
    """Position of each row in the source ("line 7"), for messages."""
    source: str = ""
    """Name of the source."""
    notes: tuple[str, ...] = ()
    """Notes for the user on columns that were recognised or computed."""
    params_derived: bool = False
    """Whether N was computed from FLOPs and D."""
    flops_exact: bool = False
    """Whether the source gave the FLOPs."""
    native: bool = False
    """Whether bigtrain wrote the source, so that its units are known."""
    units_confirmed: bool = False
    """Whether the user gave the unit of N or D."""
    identity: tuple[str, ...] = ()
    """Names of the columns of `raw` that only name a run."""
    recognised: tuple[str, ...] = ()
    """Names of the columns of `raw` from which the other columns come."""
    raw: dict[str, tuple[object, ...]] = field(default_factory=dict)
    """All columns of the source, for `--where`."""

    def __len__(self) -> int:
        return len(self.params)

    def take(self, rows: npt.ArrayLike) -> RunTable:
        """The table of some rows, given by a boolean mask of shape (n,) or by indices, in that order."""
        index = np.arange(len(self))[np.asarray(rows)]

        def pick(column: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(column[i] for i in index) if column else ()

        columns: dict[str, Any] = {name: pick(getattr(self, name)) for name in _TEXT_COLUMNS}
        for name in _NUMBER_COLUMNS:
            column = getattr(self, name)
            columns[name] = None if column is None else column[index]
        return replace(self, raw={name: pick(column) for name, column in self.raw.items()}, **columns)

    def ordered(self) -> RunTable:
        """The table sorted by its values, so that a fit does not depend on the order of the source."""
        keys = zip(self.flops, self.params, self.tokens, self.loss, self.run, strict=True)
        return self.take([i for i, _ in sorted(enumerate(keys), key=lambda one: one[1])])

    def clusters(self, kind: str) -> npt.NDArray[np.int64]:
        """The cluster of each row, numbered from 0, shape (n,): with "model" its model, with "none" the row itself."""
        if kind == "none":
            return np.arange(len(self))
        return np.unique(np.array(self.group), return_inverse=True)[1].astype(np.int64)

    def has_curves(self) -> bool:
        """Whether most rows are points of training curves: of runs with one N and several token counts each."""
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(self.run):
            rows.setdefault(name, []).append(i)
        curves = [
            one for one in rows.values()
            if len(np.unique(self.tokens[one])) >= MIN_CURVE
            and self.params[one].max() < SAME_SIZE * self.params[one].min()
        ]  # fmt: skip
        return len(curves) >= 2 and sum(len(one) for one in curves) > len(self) / 2

    def digest(self) -> str:
        """A hash of the fitted values: names, models, N, D, FLOPs and losses of the rows, in order."""
        rows = zip(self.run, self.group, self.params, self.tokens, self.flops, self.loss, strict=True)
        return hash_text("\n".join("\t".join(v if isinstance(v, str) else repr(float(v)) for v in row) for row in rows))

    def drop_highest(self, count: int) -> RunTable:
        """The table without the `count` rows with the highest losses.

        Raises:
            UserError: No row would remain.
        """
        if count >= len(self):
            raise UserError(f"--drop-highest {count} would leave nothing of {len(self)} runs", self.source)
        return self.take(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count]))


_TEXT_COLUMNS = ("run", "group", "phase", "seed", "bad", "place")
_NUMBER_COLUMNS = (
    "params", "tokens", "flops", "loss", "params_without_embeddings", "lr", "batch", "unique_tokens",
)  # fmt: skip


def named_rows(table: RunTable, rows: npt.NDArray[np.int64], *values: FloatArray) -> str:
    """Positions and values of the first `SHOWN` of some rows, as text for messages.

    Args:
        table: The runs.
        rows: Indices of the rows.
        values: Columns whose values are shown, each of shape (n,).
    """
    found = [f"{table.place[i]}: {', '.join(_number(column[i]) for column in values)}" for i in rows[:SHOWN].tolist()]
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return "; ".join(found) + more


def _number(value: float) -> str:
    return "nothing" if math.isnan(value) else f"{value:.6g}"


def groups_by_size(params: FloatArray) -> tuple[str, ...]:
    """The smallest size of each run's group as text, where sizes within 1 % of it form one group."""
    names = [""] * len(params)
    first = 0.0
    for i in np.argsort(params, kind="stable"):
        if not params[i] < first * SAME_SIZE:
            first = float(params[i])
        names[i] = f"{first:.6g}"
    return tuple(names)


def refuse_collinear(table: RunTable, parameters: int) -> None:
    """Refuse a table that does not determine the parameters of the law.

    Args:
        table: The runs.
        parameters: Number of parameters of the law.

    Raises:
        UserError: There are not more runs than parameters, fewer than three different N or D, or D is determined by N.
    """
    if len(table) <= parameters:
        raise UserError(
            f"{len(table)} runs cannot give the law's {parameters} parameters", table.source,
            f"Fit at least {parameters + 1} runs, and preferably 20.",
        )  # fmt: skip
    for name, values in (("sizes N", table.params), ("token counts D", table.tokens)):
        distinct = len(set(groups_by_size(values)))
        if distinct < 3:
            raise UserError(
                f"The runs have {distinct} different {name}: an exponent needs three",
                table.source,
                "Add runs with other values.",
            )
    x, y = np.log(table.params), np.log(table.tokens)
    design = np.column_stack([x - x.mean(), y - y.mean()])
    if np.linalg.svd(design, compute_uv=False)[1] / math.sqrt(len(table)) < MIN_SPREAD:
        ratio = table.tokens / table.params
        raise UserError(
            f"D follows from N in all runs (tokens a parameter {ratio.min():.3g} to {ratio.max():.3g}): A and B "
            "cannot be fitted separately", table.source, "Train some sizes at other D/N, over a factor of 4 at least.",
        )  # fmt: skip


MIN_SPREAD = 0.1
"""Least standard deviation of the points (ln N, ln D) perpendicular to their main direction."""


def texts(values: Sequence[object]) -> tuple[str, ...]:
    """A column as texts; a missing value becomes an empty text."""
    return tuple("" if value is None or value != value else str(value) for value in values)
