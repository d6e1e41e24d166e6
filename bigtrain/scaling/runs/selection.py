"""Selection of the rows to fit: without copies, with the best of swept settings, and warnings about other rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.runs.headers import parse_header
from bigtrain.scaling.runs.numbers import count
from bigtrain.scaling.runs.table import MIN_CURVE, SHOWN, RunTable, groups_by_size, texts

Duplicates = Literal["refuse", "drop", "keep"]
Swept = Literal["best", "all"]
Edges = Literal["refuse", "drop", "keep"]
Points = Literal["all", "last"]
LONGER = 1.2
"""Least ratio of the tokens of two runs of one size for which the curve of the longer is compared with the shorter."""
UNDECAYED = 0.003
"""Least mean log difference of these curves from finished runs for a warning."""
_REPEATS = {"seed", "replicate", "rep", "repeat", "repetition", "trial"}


def without_copies(table: RunTable, choice: Duplicates) -> tuple[RunTable, list[str]]:
    """The table with each run only once, and notes on the dropped rows.

    Two rows are the same run if all columns of the source agree, except those that name a run. Rows that differ in
    learning rate, batch, seed or loss are therefore different runs.

    Args:
        table: The runs.
        choice: What to do with copies: refuse the table, drop the copies, or keep them.

    Raises:
        UserError: There are copies, and the choice is "refuse".
    """
    if choice == "keep":
        return table, []
    named = [name for name in table.raw if name not in table.identity]
    first: dict[tuple[object, ...], int] = {}
    pairs = []
    for i in range(len(table)):
        own = (table.group[i], table.params[i], table.tokens[i], table.flops[i], table.loss[i])
        key = (*own, *(str(table.raw[name][i]) for name in named))
        if key in first:
            pairs.append((first[key], i))
        else:
            first[key] = i
    if not pairs:
        return table, []
    shown = "; ".join(
        f"{table.place[a]} and {table.place[b]} (N {table.params[a]:.6g}, D {table.tokens[a]:.6g}, loss "
        f"{table.loss[a]:.6g})"
        for a, b in pairs[:SHOWN]
    )
    more = f" and {len(pairs) - SHOWN} more pairs" if len(pairs) > SHOWN else ""
    if choice == "refuse":
        raise UserError(
            f"Two rows are the same run: {shown}{more}", table.source,
            "Give --duplicates drop to fit each run once: a run that counts twice narrows every interval.",
        )  # fmt: skip
    keep = np.ones(len(table), dtype=bool)
    keep[[b for _, b in pairs]] = False
    return table.take(keep), [f"{len(pairs)} copies of runs are dropped: {shown}{more}"]


@dataclass(frozen=True)
class _Cell:
    """The runs of one (N, D) and phase."""

    rows: npt.NDArray[np.int64]
    best: npt.NDArray[np.int64]
    """Indices of the rows with the best settings, one row per seed."""
    edge: str
    """Name of the setting whose best value lies at the edge of its grid; empty if none does."""


def best_settings(table: RunTable, swept: Swept, edges: Edges) -> tuple[RunTable, list[str]]:
    """The rows with the best learning rate and batch of each (N, D), and notes on the selection.

    Args:
        table: The runs.
        swept: Whether to fit only the best settings, or all.
        edges: What to do if a best value lies at the edge of its grid: refuse the table, drop the (N, D), or keep it.

    Raises:
        UserError: A best value lies at the edge of its grid and `edges` is "refuse", or no (N, D) remains.
    """
    settings = {
        name: column for name, column in (("learning rate", table.lr), ("batch", table.batch)) if column is not None
    }
    if not settings or swept == "all":
        return table, []
    sizes, lengths = groups_by_size(table.params), groups_by_size(table.tokens)
    cells: dict[tuple[str, ...], list[int]] = {}
    for i in range(len(table)):
        cells.setdefault((sizes[i], lengths[i], table.phase[i] if table.phase else ""), []).append(i)
    found = [_cell(table, np.array(rows), settings) for rows in cells.values()]
    several = [cell for cell in found if len(cell.best) < len(cell.rows)]
    if not several:
        return table, []
    at_edge = [cell for cell in several if cell.edge]
    swept_settings = f"{' and '.join(settings)} {'are' if len(settings) > 1 else 'is'}"
    notes = [
        f"the best of each (N, D) is fitted: {swept_settings} swept in {len(several)} of {len(found)} "
        f"pairs ({sum(len(cell.best) for cell in found)} of {len(table)} rows)"
    ]
    if at_edge and edges != "keep":
        shown = "; ".join(_described(table, cell) for cell in at_edge[:SHOWN])
        more = f" and {len(at_edge) - SHOWN} more" if len(at_edge) > SHOWN else ""
        if edges == "refuse":
            raise UserError(
                f"The best value lies at the edge of its grid in {len(at_edge)} of {len(several)} pairs (N, D): "
                f"{shown}{more}", table.source,
                "Train beyond the edge there, or give --edges drop (drops these pairs) or --edges keep.",
            )  # fmt: skip
        notes.append(f"{len(at_edge)} pairs (N, D) are dropped, their best lies at the edge of its grid: {shown}{more}")
        found = [cell for cell in found if not cell.edge]
    elif at_edge:
        notes.append(f"in {len(at_edge)} pairs (N, D) the best value lies at the edge of its grid")
    if not found:
        raise UserError("No pair (N, D) is left", table.source, "Train wider grids of learning rates and batches.")
    return table.take(np.sort(np.concatenate([cell.best for cell in found]))), notes


def _cell(table: RunTable, rows: npt.NDArray[np.int64], settings: dict[str, FloatArray]) -> _Cell:
    """The cell of some rows; its best setting has the lowest mean loss over its seeds."""
    keys = [tuple(float(column[i]) for column in settings.values()) for i in rows.tolist()]
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2 or np.isnan(np.array(distinct)).any():
        return _Cell(rows, rows, "")
    means = [float(table.loss[rows[[k == key for k in keys]]].mean()) for key in distinct]
    best = distinct[int(np.argmin(means))]
    edge = ""
    for axis, name in enumerate(settings):
        beside = {key[axis] for key in distinct if all(key[j] == best[j] for j in range(len(best)) if j != axis)}
        values = sorted(beside if len(beside) > 1 else {key[axis] for key in distinct})
        if len(values) > 1 and best[axis] in (values[0], values[-1]):
            edge = edge or name
    return _Cell(rows, rows[[key == best for key in keys]], edge)


def _described(table: RunTable, cell: _Cell) -> str:
    i = int(cell.best[0])
    column = table.lr if cell.edge == "learning rate" else table.batch
    assert column is not None
    return f"N {count(table.params[i])}, D {count(table.tokens[i])}: {cell.edge} {column[i]:.3g} ({table.place[i]})"


def last_points(table: RunTable) -> RunTable:
    """The row with the most tokens of each run."""
    last: dict[str, int] = {}
    for i, name in enumerate(table.run):
        if name not in last or table.tokens[i] > table.tokens[last[name]]:
            last[name] = i
    return table.take(sorted(last.values()))


def undecayed(table: RunTable) -> list[str]:
    """A warning if rows within runs have higher losses than runs of their size that end at the same D, or none."""
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(table.run):
        rows.setdefault(name, []).append(i)
    curves = [np.array(sorted(own, key=lambda i: table.tokens[i])) for own in rows.values()]
    sizes, gaps = groups_by_size(table.params), []
    for one in curves:
        end = one[-1]
        for other in curves:
            tokens = table.tokens[other]
            inside = tokens[0] <= table.tokens[end] and tokens[-1] > LONGER * table.tokens[end]
            if len(other) >= MIN_CURVE and sizes[other[0]] == sizes[end] and inside:
                there = np.interp(np.log(table.tokens[end]), np.log(tokens), np.log(table.loss[other]))
                gaps.append(float(there) - float(np.log(table.loss[end])))
    if len(gaps) < 3 or not np.mean(gaps) > max(UNDECAYED, 3 * np.std(gaps, ddof=1) / np.sqrt(len(gaps))):
        return []
    return [
        f"rows within runs lie {np.mean(gaps):.2%} above runs of their size that end there, as before a decay of the "
        "learning rate: give --points last to fit only the last row of each run"
    ]


def other_settings(table: RunTable) -> list[str]:
    """A warning if rows of one (N, D) differ in a column that may be a swept setting of another name, or none."""
    cells: dict[tuple[str, ...], list[int]] = {}
    keys = zip(groups_by_size(table.params), groups_by_size(table.tokens), strict=True)
    for i, key in enumerate(keys):
        cells.setdefault((*key, table.seed[i] if table.seed else "", table.phase[i] if table.phase else ""), []).append(
            i
        )
    several = [own for own in cells.values() if len(own) > 1]
    found = []
    for name, column in table.raw.items():
        values = texts(column)
        if name in table.recognised or name in table.identity or parse_header(name).words & _REPEATS:
            continue
        varied = sum(len({values[i] for i in own}) > 1 for own in several)
        # A measured quantity has another value in almost every row.
        if varied > len(cells) / 2 and len(set(values)) <= len(table) / 2:
            found.append(f"'{name}'")
    if not found:
        return []
    return [
        f"rows of one (N, D) differ in {', '.join(found)}, and all are fitted: if it is a setting that was swept, "
        "name it with --lr to fit the best of each (N, D), or choose its value with --where"
    ]
