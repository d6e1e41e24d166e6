"""Builds the table of runs from a source's columns: finds N, D, FLOPs, loss and others, and computes missing ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigtrain.config import UserError, nearest
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.runs.headers import KNOWN, columns_for, loss_of, other_losses, parse_header, plain_name, unit_of
from bigtrain.scaling.runs.numbers import parse_number
from bigtrain.scaling.runs.table import RunTable, groups_by_size, texts

Columns = dict[str, list[object]]

_ERROR = re.compile(r"\s*(?:±|\+/-|\+-).*")
"""The error of a number, as in "3.21 ± 0.01", which is not used."""
_NAMES_A_RUN = ("run", "run_id", "id", "name", "run_name", "trial", "uuid", "url", "path", "timestamp", "created_at")


@dataclass(frozen=True)
class ColumnNames:
    """The columns that the user has named, and the units of N and D; None: the column is recognised by its name."""

    params: str | None = None
    tokens: str | None = None
    flops: str | None = None
    loss: str | None = None
    group: str | None = None
    params_unit: float | None = None
    """Number of parameters in one unit of the column; None: 1, or by the column's name, and the values are checked."""
    tokens_unit: float | None = None
    """Number of tokens in one unit of the column; None: 1, or by the column's name, and the values are checked."""
    lr: str | None = None
    batch: str | None = None


def to_table(raw: Mapping[str, Sequence[object]], place: Sequence[str], source: str, named: ColumnNames) -> RunTable:
    """Build the table of runs from a source's columns.

    Args:
        raw: Columns of one length n, as they were read.
        place: Position of each row in the source, for messages.
        source: Name of the source, for messages.
        named: Columns that the user has named.

    Raises:
        UserError: There are no rows, or a column that is needed is missing.
    """
    if not place:
        raise UserError("There are no runs in the source", source)
    found, notes = _find(raw, source, named)
    bad = [""] * len(place)
    numbers = {name: _numbers(raw, column, bad, name) for name, column in found.items() if name in _NUMERIC}
    if "loss" not in numbers:
        raise UserError("There is no column of losses", source, f"Name it with --loss; the columns are {_list(raw)}.")
    numbers["loss"], note = loss_of(found["loss"], numbers["loss"])
    notes += [note] if note else []
    _to_units(raw, found, numbers, notes, named)
    if "params" not in numbers and "params_without_embeddings" in numbers:
        numbers["params"] = numbers["params_without_embeddings"]
        notes.append(f"params is column '{found['params_without_embeddings']}', without embeddings")
    if "tokens" not in numbers and "flops" not in numbers and {"ratio", "params"} <= set(numbers):
        numbers["tokens"] = numbers["params"] * numbers["ratio"]
        notes.append(f"tokens are computed: params times column '{found['ratio']}'")
    for name, unit in (("params", named.params_unit), ("tokens", named.tokens_unit)):
        if unit is not None and name in numbers:
            numbers[name] = numbers[name] * unit
    flops_exact = "flops" in numbers
    params_derived = _complete(numbers, notes, source, raw)
    group = _groups(raw, found, numbers, notes, place, params_derived, named)
    optional: dict[str, Any] = {name: texts(raw[found[name]]) for name in ("phase", "seed") if name in found}
    optional |= {name: numbers[name] for name in _OPTIONAL if name in numbers}
    plain = {name: plain_name(name) for name in raw}
    return RunTable(
        run=texts(raw[found["run"]]) if "run" in found else tuple(place), group=group, params=numbers["params"],
        tokens=numbers["tokens"], flops=numbers["flops"], loss=numbers["loss"], place=tuple(place), source=source,
        notes=tuple(notes), params_derived=params_derived, flops_exact=flops_exact, bad=tuple(bad),
        units_confirmed=named.params_unit is not None or named.tokens_unit is not None,
        identity=tuple(name for name in raw if plain[name] in _NAMES_A_RUN or plain[name].startswith("_")),
        recognised=tuple(found.values()), raw={name: tuple(column) for name, column in raw.items()}, **optional,
    )  # fmt: skip


_OPTIONAL = ("params_without_embeddings", "lr", "batch", "unique_tokens")
_NUMERIC = ("params", "tokens", "flops", "loss", "ratio", *_OPTIONAL)


def _to_units(
    raw: Mapping[str, Sequence[object]], found: dict[str, str], numbers: dict[str, FloatArray], notes: list[str],
    named: ColumnNames,
) -> None:  # fmt: skip
    """Convert columns whose names have a unit, unless the user or the cells have given one."""
    for name, column in found.items():
        if name in numbers and name != "loss" and parse_header(column).log10:
            numbers[name] = 10.0 ** numbers[name]
            notes.append(f"column '{column}' has decimal logarithms, by its name")
        factor = unit_of(name, column)
        given = {"params": named.params_unit, "params_without_embeddings": named.params_unit,
                 "tokens": named.tokens_unit}.get(name)  # fmt: skip
        if (
            factor != 1
            and given is None
            and not any(
                isinstance(cell, str) and cell.strip()[-1:].isalpha() and parse_number(cell) is not None
                for cell in raw[column]
            )
        ):
            numbers[name] = numbers[name] * factor
            notes.append(f"column '{column}' counts in {factor:g}, by its name")


def _groups(
    raw: Mapping[str, Sequence[object]], found: dict[str, str], numbers: dict[str, FloatArray], notes: list[str],
    place: Sequence[str], params_derived: bool, named: ColumnNames,
) -> tuple[str, ...]:  # fmt: skip
    """The model of each row: the value of a column whose values have one N each, otherwise by the size of N."""
    if "group" in found:
        group = texts(raw[found["group"]])
        if named.group is not None or params_derived or _one_size_each(group, numbers["params"]):
            notes.append(f"models are distinguished by column '{found['group']}'")
            return group
        notes.append(f"column '{found['group']}' does not distinguish models: several N to a value, or one row")
    if params_derived:
        notes.append("every run is its own model: N follows from FLOPs and tokens")
        return tuple(str(i) for i in range(len(place)))
    notes.append("models are distinguished by their size, to 1 %")
    return groups_by_size(numbers["params"])


def _one_size_each(group: tuple[str, ...], params: FloatArray) -> bool:
    """Whether the values of a column are models: most have one N each, and they do not merely number the rows."""
    sizes: dict[str, set[str]] = {}
    by_size = groups_by_size(params)
    for name, size in zip(group, by_size, strict=True):
        sizes.setdefault(name, set()).add(size)
    several = sum(len(one) > 1 for one in sizes.values())
    alone = len(sizes) == len(group) and len(set(by_size)) < len(group)
    return several * 2 < len(sizes) and not alone


def _find(raw: Mapping[str, Sequence[object]], source: str, named: ColumnNames) -> tuple[dict[str, str], list[str]]:
    found, notes = {}, []
    for wanted in KNOWN:
        given = getattr(named, wanted, None)
        if given is not None:
            if given not in raw:
                close = nearest(given, raw)
                raise UserError(
                    f"There is no column '{given}' (--{wanted})", source,
                    f"Did you mean '{close}'?" if close else f"The columns are {_list(raw)}.",
                )  # fmt: skip
            found[wanted] = given
            continue
        # A vague name must not bring in FLOPs that are not needed.
        strict = wanted == "flops" and {"params", "tokens"} <= set(found)
        matches = columns_for(wanted, raw, strict) or (other_losses(raw) if wanted == "loss" else [])
        if matches:
            found[wanted] = matches[0]
            several = wanted in ("params", "tokens", "loss") and len(matches) > 1
            others = f" (not {', '.join(matches[1:])})" if several else ""
            if wanted in ("params", "tokens", "flops", "loss"):
                notes.append(f"{wanted} is column '{matches[0]}'{others}")
    return found, notes


def _complete(
    numbers: dict[str, FloatArray], notes: list[str], source: str, raw: Mapping[str, Sequence[object]]
) -> bool:
    """Compute the missing one of N, D and C by C = 6 N D; returns whether N was the missing one."""
    missing = [name for name in ("params", "tokens", "flops") if name not in numbers]
    if len(missing) > 1:
        flags = " and ".join(f"--{name}" for name in missing)
        raise UserError(
            f"There are no columns of {' and '.join(missing)}: two of params, tokens and flops are needed", source,
            f"Name one with {flags}; the columns are {_list(raw)}.",
        )  # fmt: skip
    if not missing:
        return False
    k = FLOPS_PER_PARAMETER_TOKEN
    with np.errstate(divide="ignore", invalid="ignore"):
        if missing == ["tokens"]:
            numbers["tokens"] = numbers["flops"] / (k * numbers["params"])
            notes.append("tokens are computed: D = C / (6 N)")
        elif missing == ["params"]:
            numbers["params"] = numbers["flops"] / (k * numbers["tokens"])
            notes.append("params are computed: N = C / (6 D)")
        else:
            numbers["flops"] = k * numbers["params"] * numbers["tokens"]
            notes.append("FLOPs are computed: C = 6 N D")
    return missing == ["params"]


def _numbers(raw: Mapping[str, Sequence[object]], column: str, bad: list[str], name: str) -> FloatArray:
    """A column as numbers, shape (n,). A cell that does not parse becomes NaN, and is noted in `bad`.

    It is refused only after the selection of rows, if its row is still there.
    """
    out = np.empty(len(bad))
    for i, value in enumerate(raw[column]):
        number = parse_number(_ERROR.sub("", value) if isinstance(value, str) else value)
        if number is None and name not in (*_OPTIONAL, "ratio"):
            bad[i] = bad[i] or f"{_short(value)} in column '{column}'"
        out[i] = np.nan if number is None else number
    return out


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _list(raw: Mapping[str, Sequence[object]]) -> str:
    names = list(raw)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def rows_to_columns(rows: list[tuple[str, dict[str, Any]]]) -> tuple[Columns, list[str]]:
    """Columns and positions of rows, each given as (position, object).

    A key that an object lacks is None in its column. Nested objects become columns with dotted names.
    """
    flat = [(place, flatten(row)) for place, row in rows]
    names = list(dict.fromkeys(name for _, row in flat for name in row))
    return {name: [row.get(name) for _, row in flat] for name in names}, [place for place, _ in flat]


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dict without nested dicts, whose keys become dotted names."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out
