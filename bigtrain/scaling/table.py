"""The one table of runs that every fit reads, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.storage import hash_text

RATIO_RANGE = (1e-2, 1e6)
"""Tokens a parameter that a run can have had; beyond it a unit is wrong (D in billions beside N in units)."""
FLOPS_RANGE = (0.05, 30.0)
"""FLOPs over 6 N D that can be: small models with a large head have many, N with embeddings makes it less."""
MIN_PARAMS, MAX_LOSS = 100.0, 50.0
SAME_SIZE = 1.01
"""Models are one where their sizes differ by less, if nothing names them."""
_SHOWN = 5


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
    """What the learning rate had come to ("decayed", "stable"); empty where not known."""
    seed: tuple[str, ...] = ()
    params_without_embeddings: FloatArray | None = None
    place: tuple[str, ...] = ()
    """Where each row stands in the source ("line 7"), for messages."""
    source: str = ""
    notes: tuple[str, ...] = ()
    """What was guessed or computed on reading."""
    params_derived: bool = False
    flops_exact: bool = False
    raw: dict[str, tuple[object, ...]] = field(default_factory=dict)
    """The source's own columns, for `--where`."""

    def __len__(self) -> int:
        return len(self.params)

    def take(self, rows: npt.ArrayLike) -> RunTable:
        """The rows of that boolean mask or those indices, in order."""
        index = np.arange(len(self))[np.asarray(rows)]

        def pick(column: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(column[i] for i in index) if column else ()

        without = self.params_without_embeddings
        return replace(
            self, run=pick(self.run), group=pick(self.group), phase=pick(self.phase), seed=pick(self.seed),
            place=pick(self.place), params=self.params[index], tokens=self.tokens[index], flops=self.flops[index],
            loss=self.loss[index], params_without_embeddings=None if without is None else without[index],
            raw={name: pick(column) for name, column in self.raw.items()},
        )  # fmt: skip

    def ordered(self) -> RunTable:
        """The rows in an order of their own, so that a fit does not depend on how its source orders them."""
        keys = zip(self.flops, self.params, self.tokens, self.loss, self.run, strict=True)
        return self.take([i for i, _ in sorted(enumerate(keys), key=lambda one: one[1])])

    def clusters(self, kind: str) -> npt.NDArray[np.int64]:
        """The cluster of each row, numbered from 0: its model's, or with "none" its own."""
        if kind == "none":
            return np.arange(len(self))
        return np.unique(np.array(self.group), return_inverse=True)[1].astype(np.int64)

    def digest(self) -> str:
        """The hash of what is fitted: names, models, N, D, FLOPs, losses, in order."""
        rows = zip(self.run, self.group, self.params, self.tokens, self.flops, self.loss, strict=True)
        return hash_text("\n".join("\t".join(v if isinstance(v, str) else repr(float(v)) for v in row) for row in rows))

    def drop_highest(self, count: int) -> RunTable:
        """Without the `count` rows of the highest loss."""
        if count >= len(self):
            raise UserError(f"--drop-highest {count} would leave nothing of {len(self)} runs", self.source)
        return self.take(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count]))


def groups_by_size(params: FloatArray) -> tuple[str, ...]:
    """Names for models that only their size tells apart: those within 1 % of each other are one."""
    names = [""] * len(params)
    first = 0.0
    for i in np.argsort(params, kind="stable"):
        if not params[i] < first * SAME_SIZE:
            first = float(params[i])
        names[i] = f"{first:.6g}"
    return tuple(names)


def check(table: RunTable) -> None:
    """Refuse what no law can be fitted to.

    Raises:
        UserError: Values that are missing, not finite or in impossible units; duplicates; phases that are mixed.
    """
    if not len(table):
        raise UserError("There are no runs to fit", table.source, "check the file, and --where")
    for name in ("loss", "params", "tokens", "flops"):
        values = getattr(table, name)
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            raise UserError(
                f"{name} must be a positive number in every row; {_rows(table, bad, values)}", table.source,
                f'leave those rows out, for example with --where "{name} > 0"',
            )  # fmt: skip
    _check_units(table)
    _check_duplicates(table)
    phases = sorted({phase for phase in table.phase if phase})
    if len(phases) > 1 or (phases and "" in table.phase):
        raise UserError(
            f"Runs of several phases are mixed ({', '.join(phases)}{', none' if '' in table.phase else ''}): decayed "
            "and undecayed losses follow different laws", table.source,
            f'choose one, for example with --where "phase == {phases[0]}"',
        )  # fmt: skip


def _check_units(table: RunTable) -> None:
    large = table.loss > MAX_LOSS
    if large.any():
        raise UserError(
            f"A loss above {MAX_LOSS:g} nats a token cannot be; {_rows(table, large, table.loss)}", table.source,
            "give the loss in nats a token, not a perplexity",
        )  # fmt: skip
    ratio = table.tokens / table.params
    small = table.params < MIN_PARAMS
    wrong = (ratio < RATIO_RANGE[0]) | (ratio > RATIO_RANGE[1])
    if small.any() or wrong.any():
        shown = small if small.any() else wrong
        raise UserError(
            f"N and D cannot be in these units; {_rows(table, shown, table.params, table.tokens)} as N, D "
            f"({float(ratio[shown][0]):.3g} tokens a parameter)", table.source,
            "give both in units: 400000000 parameters, 8e9 tokens, not millions or billions",
        )  # fmt: skip
    share = table.flops / (FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens)
    wrong = (share < FLOPS_RANGE[0]) | (share > FLOPS_RANGE[1])
    if wrong.any():
        raise UserError(
            f"FLOPs do not fit N and D: {float(share[wrong][0]):.3g} times 6 N D; {_rows(table, wrong, table.flops)}",
            table.source, "give N, D and FLOPs in units (1e18, not exaFLOPs or PF-days)",
        )  # fmt: skip


def _check_duplicates(table: RunTable) -> None:
    seen: dict[tuple[object, ...], int] = {}
    seeds = table.seed or ("",) * len(table)
    for i in range(len(table)):
        key = (table.group[i], table.params[i], table.tokens[i], seeds[i], table.loss[i])
        if key in seen:
            raise UserError(
                f"Two rows are one run: {table.place[seen[key]]} and {table.place[i]} (N {table.params[i]:.6g}, "
                f"D {table.tokens[i]:.6g}, loss {table.loss[i]:.6g})", table.source,
                "leave one of them out; a run that counts twice narrows every interval",
            )  # fmt: skip
        seen[key] = i


def _rows(table: RunTable, bad: npt.NDArray[np.bool_], *values: FloatArray) -> str:
    found = np.flatnonzero(bad)
    texts = [f"{table.place[i]}: {', '.join(_number(column[i]) for column in values)}" for i in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "; ".join(texts) + more


def _number(value: float) -> str:
    return "nothing" if math.isnan(value) else f"{value:.6g}"


def refuse_collinear(table: RunTable, parameters: int) -> None:
    """Refuse designs from which the parametric fit cannot be told.

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
            "cannot be told apart", table.source, "train some sizes at other D/N, over a factor of 4 at least",
        )  # fmt: skip


MIN_SPREAD = 0.1
"""Least standard deviation of (ln N, ln D) across the line that they lie along."""


def texts(values: Sequence[object]) -> tuple[str, ...]:
    """A column as texts; what is missing is empty."""
    return tuple("" if value is None or value != value else str(value) for value in values)
