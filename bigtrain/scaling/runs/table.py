"""The one table of runs that every fit reads."""

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
"""Models are one where their sizes differ by less, if nothing names them."""
SHOWN = 5
"""Rows that a message names."""
MIN_CURVE = 4
"""Points of a run that make a training curve."""


@dataclass(frozen=True)
class RunTable:
    """Finished runs, or points of their curves, one a row; all columns have one length n."""

    run: tuple[str, ...]
    group: tuple[str, ...]
    """The model that a row belongs to: what the bootstrap keeps together."""
    params: FloatArray
    """N as the law sees it, shape (n,)."""
    tokens: FloatArray
    flops: FloatArray
    """Exact where the source gives them, else 6 N D."""
    loss: FloatArray
    """Nats a token."""
    phase: tuple[str, ...] = ()
    """Phase of the schedule ("decayed", "stable"); empty where not known."""
    seed: tuple[str, ...] = ()
    lr: FloatArray | None = None
    """Peak learning rate; NaN where a row has none."""
    batch: FloatArray | None = None
    """Batch size, in the source's own unit."""
    unique_tokens: FloatArray | None = None
    """Tokens of the data set, where runs repeat it."""
    bad: tuple[str, ...] = ()
    """Of each row, its first cell that is not a number ("'NA' in column 'loss'"), or nothing."""
    params_without_embeddings: FloatArray | None = None
    place: tuple[str, ...] = ()
    """Where each row stands in the source ("line 7"), for messages."""
    source: str = ""
    notes: tuple[str, ...] = ()
    """What was guessed or computed on reading."""
    params_derived: bool = False
    flops_exact: bool = False
    native: bool = False
    """Whether bigtrain wrote the source: its units are then known."""
    units_confirmed: bool = False
    """Whether the caller gave the units of N or D."""
    identity: tuple[str, ...] = ()
    """Columns of `raw` that only name a run."""
    raw: dict[str, tuple[object, ...]] = field(default_factory=dict)
    """The source's own columns, for `--where`."""

    def __len__(self) -> int:
        return len(self.params)

    def take(self, rows: npt.ArrayLike) -> RunTable:
        """The rows of that boolean mask or those indices, in order."""
        index = np.arange(len(self))[np.asarray(rows)]

        def pick(column: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(column[i] for i in index) if column else ()

        columns: dict[str, Any] = {name: pick(getattr(self, name)) for name in _TEXT_COLUMNS}
        for name in _NUMBER_COLUMNS:
            column = getattr(self, name)
            columns[name] = None if column is None else column[index]
        return replace(self, raw={name: pick(column) for name, column in self.raw.items()}, **columns)

    def ordered(self) -> RunTable:
        """The rows in an order of their own, so that a fit does not depend on how its source orders them."""
        keys = zip(self.flops, self.params, self.tokens, self.loss, self.run, strict=True)
        return self.take([i for i, _ in sorted(enumerate(keys), key=lambda one: one[1])])

    def clusters(self, kind: str) -> npt.NDArray[np.int64]:
        """The cluster of each row, numbered from 0: its model's, or with "none" its own."""
        if kind == "none":
            return np.arange(len(self))
        return np.unique(np.array(self.group), return_inverse=True)[1].astype(np.int64)

    def has_curves(self) -> bool:
        """Whether rows are points of training curves: most belong to runs of one N with several token counts each."""
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
        """The hash of what is fitted: names, models, N, D, FLOPs, losses, in order."""
        rows = zip(self.run, self.group, self.params, self.tokens, self.flops, self.loss, strict=True)
        return hash_text("\n".join("\t".join(v if isinstance(v, str) else repr(float(v)) for v in row) for row in rows))

    def drop_highest(self, count: int) -> RunTable:
        """Without the `count` rows of the highest loss."""
        if count >= len(self):
            raise UserError(f"--drop-highest {count} would leave nothing of {len(self)} runs", self.source)
        return self.take(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count]))


_TEXT_COLUMNS = ("run", "group", "phase", "seed", "bad", "place")
_NUMBER_COLUMNS = (
    "params", "tokens", "flops", "loss", "params_without_embeddings", "lr", "batch", "unique_tokens",
)  # fmt: skip


def named_rows(table: RunTable, rows: npt.NDArray[np.int64], *values: FloatArray) -> str:
    """The first few of those rows by their places and values, for messages."""
    found = [f"{table.place[i]}: {', '.join(_number(column[i]) for column in values)}" for i in rows[:SHOWN].tolist()]
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return "; ".join(found) + more


def _number(value: float) -> str:
    return "nothing" if math.isnan(value) else f"{value:.6g}"


def groups_by_size(params: FloatArray) -> tuple[str, ...]:
    """Names for models that differ only in size: those within 1 % of each other are one."""
    names = [""] * len(params)
    first = 0.0
    for i in np.argsort(params, kind="stable"):
        if not params[i] < first * SAME_SIZE:
            first = float(params[i])
        names[i] = f"{first:.6g}"
    return tuple(names)


def refuse_collinear(table: RunTable, parameters: int) -> None:
    """Refuse designs that do not determine the parametric fit.

    Raises:
        UserError: Fewer runs than parameters; fewer than three N or D; one D for each N by one rule.
    """
    if len(table) <= parameters:
        raise UserError(
            f"{len(table)} runs cannot give the law's {parameters} parameters", table.source,
            f"fit at least {parameters + 1} runs, better 20",
        )  # fmt: skip
    for name, values in (("sizes N", table.params), ("token counts D", table.tokens)):
        distinct = len(set(groups_by_size(values)))
        if distinct < 3:
            raise UserError(
                f"The runs have {distinct} different {name}: an exponent needs three", table.source, "add runs"
            )
    x, y = np.log(table.params), np.log(table.tokens)
    design = np.column_stack([x - x.mean(), y - y.mean()])
    if np.linalg.svd(design, compute_uv=False)[1] / math.sqrt(len(table)) < MIN_SPREAD:
        ratio = table.tokens / table.params
        raise UserError(
            f"D follows from N in all runs (tokens a parameter {ratio.min():.3g} to {ratio.max():.3g}): A and B "
            "cannot be fitted separately", table.source, "train some sizes at other D/N, over a factor of 4 at least",
        )  # fmt: skip


MIN_SPREAD = 0.1
"""Least standard deviation of (ln N, ln D) across the line that they lie along."""


def texts(values: Sequence[object]) -> tuple[str, ...]:
    """A column as texts; what is missing is empty."""
    return tuple("" if value is None or value != value else str(value) for value in values)
