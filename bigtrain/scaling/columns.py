"""From a source's own columns to the table of runs: which column is which, and what follows from what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigtrain.config import UserError, nearest
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.table import RunTable, groups_by_size, texts

Columns = dict[str, list[object]]

_KNOWN: dict[str, tuple[str, ...]] = {
    "params": ("params", "n", "n_params", "num_params", "parameters", "parameter_count", "model_size",
               "params_active_precise", "total_params"),
    "tokens": ("tokens", "d", "n_tokens", "num_tokens", "training_tokens", "train_tokens", "total_tokens"),
    "flops": ("flops", "c", "flop", "training_flop", "training_flops", "train_flops", "total_flops", "compute",
              "compute_budget"),
    "loss": ("val_loss", "validation_loss", "eval_loss", "final_loss", "loss", "test_loss", "train_loss"),
    "group": ("group", "model", "model_name", "run_name"),
    "run": ("run", "run_id", "id", "trial", "name", "run_name"),
    "seed": ("seed",),
    "phase": ("phase", "schedule_phase"),
    "params_without_embeddings": ("params_without_embeddings", "n_without_embeddings", "non_embedding_params",
                                  "params_non_embedding"),
}  # fmt: skip
"""Names by which each column is guessed, in the order of preference."""


@dataclass(frozen=True)
class ColumnNames:
    """The columns that the user has named; None is guessed."""

    params: str | None = None
    tokens: str | None = None
    flops: str | None = None
    loss: str | None = None
    group: str | None = None


def to_table(raw: Mapping[str, Sequence[object]], place: Sequence[str], source: str, named: ColumnNames) -> RunTable:
    """The table of runs of a source's columns.

    Args:
        raw: Columns of one length n, as they were read.
        place: Where each row stands, for messages.
        source: Where the columns come from.
        named: Columns that the user has named.

    Raises:
        UserError: A column that is missing, or that holds no numbers.
    """
    if not place:
        raise UserError("There are no runs in the source", source)
    found, notes = _find(raw, source, named)
    numbers = {name: _numbers(raw, column, place, source) for name, column in found.items() if name in _NUMERIC}
    if "loss" not in numbers:
        raise UserError("There is no column of losses", source, f"name it with --loss; there are: {_list(raw)}")
    flops_exact = "flops" in numbers
    params_derived = _complete(numbers, notes, source, raw)
    if "group" in found:
        group = texts(raw[found["group"]])
    elif params_derived:
        group = tuple(str(i) for i in range(len(place)))
        notes.append("every run is its own model: N follows from FLOPs and tokens")
    else:
        group = groups_by_size(numbers["params"])
        notes.append("models are told apart by their size, to 1 %")
    optional = {name: texts(raw[found[name]]) for name in ("phase", "seed") if name in found}
    return RunTable(
        run=texts(raw[found["run"]]) if "run" in found else tuple(place), group=group, params=numbers["params"],
        tokens=numbers["tokens"], flops=numbers["flops"], loss=numbers["loss"],
        params_without_embeddings=numbers.get("params_without_embeddings"), place=tuple(place), source=source,
        notes=tuple(notes), params_derived=params_derived, flops_exact=flops_exact,
        raw={name: tuple(column) for name, column in raw.items()}, **optional,
    )  # fmt: skip


_NUMERIC = ("params", "tokens", "flops", "loss", "params_without_embeddings")


def _find(raw: Mapping[str, Sequence[object]], source: str, named: ColumnNames) -> tuple[dict[str, str], list[str]]:
    plain = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in reversed(list(raw))}
    found, notes = {}, []
    for wanted, guesses in _KNOWN.items():
        given = getattr(named, wanted, None)
        if given is not None:
            if given not in raw:
                close = nearest(given, raw)
                raise UserError(
                    f"There is no column '{given}' (--{wanted})", source,
                    f"Did you mean '{close}'?" if close else f"there are: {_list(raw)}",
                )  # fmt: skip
            found[wanted] = given
            continue
        matches = [plain[guess] for guess in guesses if guess in plain]
        if matches:
            found[wanted] = matches[0]
            others = f" (not {', '.join(matches[1:])})" if wanted == "loss" and len(matches) > 1 else ""
            if wanted in ("params", "tokens", "flops", "loss", "group"):
                notes.append(f"{wanted} is column '{matches[0]}'{others}")
    return found, notes


def _complete(
    numbers: dict[str, FloatArray], notes: list[str], source: str, raw: Mapping[str, Sequence[object]]
) -> bool:
    """Compute what is missing of N, D and C by C = 6 N D; returns whether N was."""
    missing = [name for name in ("params", "tokens", "flops") if name not in numbers]
    if len(missing) > 1:
        flags = " and ".join(f"--{name}" for name in missing)
        raise UserError(
            f"There are no columns of {' and '.join(missing)}: two of params, tokens and flops are needed", source,
            f"name one with {flags}; there are: {_list(raw)}",
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


def _numbers(raw: Mapping[str, Sequence[object]], column: str, place: Sequence[str], source: str) -> FloatArray:
    out = np.empty(len(place))
    for i, value in enumerate(raw[column]):
        if value is None or (isinstance(value, str) and not value.strip()):
            out[i] = np.nan
            continue
        try:
            out[i] = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise UserError(f"{value!r} in column '{column}' is not a number", f"{source}, {place[i]}") from None
    return out


def _list(raw: Mapping[str, Sequence[object]]) -> str:
    names = list(raw)
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def rows_to_columns(rows: list[tuple[str, dict[str, Any]]]) -> tuple[Columns, list[str]]:
    """Columns of (place, object) rows; what an object lacks is None. Objects inside are joined by dots."""
    flat = [(place, flatten(row)) for place, row in rows]
    names = list(dict.fromkeys(name for _, row in flat for name in row))
    return {name: [row.get(name) for _, row in flat] for name in names}, [place for place, _ in flat]


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects by dotted names."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out
