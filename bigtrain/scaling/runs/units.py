"""Checks that the values of a table are plausible: impossible columns are refused, odd rows are listed in warnings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from bigtrain.scaling.runs.numbers import count
from bigtrain.scaling.runs.table import RunTable, named_rows

RATIO_RANGE = (1e-2, 1e5)
"""Range of tokens per parameter of ordinary runs; a median outside it shows that a column has another unit."""
FLOPS_RANGE = (0.05, 30.0)
"""Range of FLOPs / (6 N D) of ordinary runs; a large output head raises the ratio, an N with embeddings lowers it."""
LEAST_LARGEST_PARAMS, LEAST_LARGEST_TOKENS = 2e4, 1e6
"""If the largest N or D of a table is smaller, its unit is assumed to be thousands, millions or billions."""
SMALL_LARGEST_PARAMS = 1e6
"""A warning is given if the largest N of a table is smaller."""
MAX_LOSS = 14.0
"""Largest plausible loss in nats per token, that of a uniform guess over 1.2 million tokens; a larger value is a
perplexity, or comes from a run that diverged."""
_UNITS_FIX = (
    "Name the units in the header, as in 'params (M)' and 'tokens (B)', or with --params-unit and --tokens-unit of "
    "scaling fit (1 where the values are right)"
)


def check_values(table: RunTable) -> list[str]:
    """Refuse a table to which no law can be fitted.

    Returns:
        Warnings about odd rows, which are fitted nevertheless.

    Raises:
        UserError: There are no runs, a value is missing or not a positive number, a column has an impossible unit, or
            runs of several phases are mixed.
    """
    if not len(table):
        raise UserError("There are no runs to fit", table.source, "Check the file, and --where.")
    if table.bad:
        rows = [i for i, cell in enumerate(table.bad) if cell]
        if rows:
            shown = "; ".join(f"{table.place[i]}: {table.bad[i]}" for i in rows[:3])
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            column = table.bad[rows[0]].rpartition("in column '")[2].rstrip("'")
            fix = f'Exclude those rows, for example with --where "{column} > 0"'
            if len(rows) == len(table):
                fix = "Write numbers such as 3.45 or 1,000,000, or name another column, for example with --loss."
            raise UserError(f"A cell is not a number ({shown}{more})", table.source, fix)
    for name in ("loss", "params", "tokens", "flops"):
        values = getattr(table, name)
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            finite = f" and {name} < 1e40" if np.isinf(values).any() else ""
            raise UserError(
                f"{name} must be a positive number in every row; {named_rows(table, np.flatnonzero(bad), values)}",
                table.source, f'Drop those rows, for example with --where "{name} > 0{finite}"',
            )  # fmt: skip
    _check_phases(table)
    return [*_check_columns(table), *_odd_rows(table)]


def _check_phases(table: RunTable) -> None:
    phases = sorted({phase for phase in table.phase if phase})
    if len(phases) > 1 or (phases and "" in table.phase):
        raise UserError(
            f"Runs of several phases are mixed ({', '.join(phases)}{', none' if '' in table.phase else ''}): decayed "
            "and undecayed losses follow different laws", table.source,
            f"choose one, for example with --where 'phase == \"{phases[0]}\"'",
        )  # fmt: skip


def _check_columns(table: RunTable) -> list[str]:
    """Refuse a table with a column in another unit than expected; returns a warning if N is small."""
    if np.median(table.loss) > MAX_LOSS:
        raise UserError(
            f"Losses above {MAX_LOSS:g} nats per token are not plausible; "
            f"{named_rows(table, np.arange(len(table)), table.loss)}",
            table.source, "Give the loss in nats per token; call a column of perplexities val_ppl.",
        )  # fmt: skip
    if table.native:
        return []
    ratio = np.median(table.tokens / table.params)
    n, d = float(table.params.max()), float(table.tokens.max())
    confirmed = table.units_confirmed
    small = n < LEAST_LARGEST_PARAMS or d < LEAST_LARGEST_TOKENS
    if (small or not RATIO_RANGE[0] <= ratio <= RATIO_RANGE[1]) and not confirmed:
        raise UserError(
            f"N and D are not plausible in these units: the largest N is {n:.6g}, the largest D {d:.6g}, the median "
            f"of D/N {ratio:.3g}; {named_rows(table, np.arange(len(table)), table.params, table.tokens)} as N, D",
            table.source, _UNITS_FIX,
        )  # fmt: skip
    share = float(np.median(table.flops / (FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens)))
    if not FLOPS_RANGE[0] <= share <= FLOPS_RANGE[1]:
        raise UserError(
            f"FLOPs do not fit N and D: the median is {share:.3g} times 6 N D; "
            f"{named_rows(table, np.arange(len(table)), table.flops)}",
            table.source, "Give N, D and FLOPs in units (1e18, not exaFLOPs or PF-days).",
        )  # fmt: skip
    if n < SMALL_LARGEST_PARAMS and not confirmed:
        return [f"the largest model has {count(n)} parameters: if N is in thousands or millions, give --params-unit"]
    return []


def _odd_rows(table: RunTable) -> list[str]:
    """Warnings about rows with unusual values in columns that are plausible as a whole."""
    ratio = table.tokens / table.params
    share = table.flops / (FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens)
    found = []
    checks: tuple[tuple[str, npt.NDArray[np.float64], tuple[float, float]], ...] = (
        ("tokens a parameter", ratio, RATIO_RANGE), ("FLOPs over 6 N D", share, FLOPS_RANGE),
        ("a loss in nats", table.loss, (0.0, MAX_LOSS)),
    )  # fmt: skip
    for name, values, (low, high) in checks:
        rows = np.flatnonzero((values < low) | (values > high))
        if len(rows):
            found.append(f"{len(rows)} odd rows are fitted: {named_rows(table, rows, values)} as {name}")
    return found
