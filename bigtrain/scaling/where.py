"""`--where`: comparisons of columns with values, joined by "and". Parsed here, never evaluated as code."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from bigtrain.config import UserError, nearest
from bigtrain.scaling.table import RunTable, texts

_CLAUSE = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([^\s<>=!"']+))\s*(<=|>=|==|!=|=|<|>)\s*(.+?)\s*""")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "=": operator.eq,
    "!=": operator.ne,
}  # fmt: skip
_OWN = ("params", "tokens", "flops", "loss", "run", "group", "phase", "seed")


def where(table: RunTable, expression: str) -> RunTable:
    """The rows for which every comparison holds.

    Args:
        expression: Such as `flops < 1e21 and width == 512`; names are params, tokens, flops, loss, run, group, phase,
            seed, or the source's own columns, quoted where they hold spaces.

    Raises:
        UserError: An expression that cannot be read, or a column that is not there.
    """
    keep = np.ones(len(table), dtype=bool)
    for clause in re.split(r"\s+and\s+", expression.strip()):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise UserError(
                f"--where cannot read {clause!r}", "command line",
                'write comparisons joined by "and", such as --where "flops < 1e21 and phase == decayed"',
            )  # fmt: skip
        name = match.group(1) or match.group(2) or match.group(3)
        keep &= _holds(table, name, match.group(4), match.group(5).strip("\"'"))
    return table.take(keep)


def _holds(table: RunTable, name: str, sign: str, text: str) -> np.ndarray:
    if name in _OWN and len(getattr(table, name)) == len(table):
        column: Any = getattr(table, name)
    elif name in table.raw:
        column = table.raw[name]
    else:
        known = [*_OWN, *table.raw]
        close = nearest(name, known)
        raise UserError(
            f"--where names a column '{name}' that is not there", table.source,
            f"Did you mean '{close}'?" if close else f"there are: {', '.join(known)}",
        )  # fmt: skip
    try:
        wanted = float(text)
        values = np.array([float("nan") if value in (None, "") else float(value) for value in column])
    except (TypeError, ValueError):
        if sign not in ("==", "=", "!="):
            raise UserError(f"--where compares texts by {sign}: '{name} {sign} {text}'", "command line") from None
        return np.asarray(_OPERATORS[sign](np.array(texts(column)), text))
    return np.asarray(_OPERATORS[sign](values, wanted))
