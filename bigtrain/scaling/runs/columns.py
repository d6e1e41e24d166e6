"""Builds the table of runs from a source's columns: finds N, D, FLOPs, loss and others, and computes missing ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigtrain.config import UserError, nearest
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.runs.numbers import parse_number
from bigtrain.scaling.runs.table import RunTable, groups_by_size, texts

Columns = dict[str, list[object]]

_KNOWN: dict[str, tuple[str, ...]] = {
    "params": ("active_params", "params_active", "activated_params", "num_active_params", "params_active_precise",
               "params", "n", "n_params", "num_params", "parameters", "parameter_count", "model_size", "total_params",
               "params_total"),
    "tokens": ("tokens", "d", "n_tokens", "num_tokens", "training_tokens", "train_tokens", "total_tokens"),
    "flops": ("flops", "c", "flop", "training_flop", "training_flops", "train_flops", "total_flops", "compute",
              "compute_budget"),
    "loss": ("val_loss", "validation_loss", "eval_loss", "final_loss", "loss", "loss_validation", "loss_val",
             "loss_eval", "test_loss", "train_loss"),
    "group": ("group", "model", "model_name", "run_name"),
    "run": ("run", "run_id", "id", "trial", "name", "run_name"),
    "seed": ("seed",),
    "phase": ("phase", "schedule_phase"),
    "lr": ("lr", "learning_rate", "peak_lr", "max_lr", "optimizer_lr"),
    "batch": ("batch_tokens", "batch_size", "batch", "bs", "global_batch_size", "global_batch"),
    "unique_tokens": ("unique_tokens", "tokens_unique", "unique_d", "dataset_tokens"),
    "ratio": ("tokens_per_param", "tokens_per_parameter", "tokens_per_params", "d_n", "d_over_n"),
    "params_without_embeddings": ("params_without_embeddings", "n_without_embeddings", "non_embedding_params",
                                  "params_non_embedding", "n_params_non_embedding", "non_embedding_parameters",
                                  "num_params_non_embedding"),
}  # fmt: skip
"""Names by which each column is recognised, in order of preference."""
_LOSS_LIKE = tuple(re.compile(pattern) for pattern in (
    r"(^|_)(val|valid|validation|eval|evaluation|held_out|test)(_.*)?_(loss|nll|ce|cross_entropy)(_|$)",
    r"(^|_)(loss|nll|ce|cross_entropy)(_.*)?_(val|valid|validation|eval|evaluation|held_out|test)(_|$)",
    r"(^|_)(loss|nll|cross_entropy)$",
))  # fmt: skip
"""Patterns of further names of columns of losses, such as `eval/c4/loss` and `smooth loss`."""
_NO_LOSS = re.compile(r"(^|_)(aux|z|balanc\w*|router|std|scale|scaler|var|grad|bound|delta)(_|$)")
_UNIT = re.compile(r"(?P<base>.+)_(?:in_)?(?P<unit>k|m|b|g|t|thousands?|millions?|billions?|trillions?)")
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_FLOP_UNITS = {
    **dict.fromkeys(("pflops", "pflop", "petaflops", "petaflop"), 1e15),
    **dict.fromkeys(("eflops", "eflop", "exaflops", "exaflop"), 1e18),
    **dict.fromkeys(("zflops", "zflop", "zettaflops", "zettaflop"), 1e21),
    **dict.fromkeys(("pf_days", "pfs_days", "petaflop_days", "petaflops_days", "petaflop_s_days"), 8.64e19),
}
"""Names of columns of FLOPs that state the unit, with the unit in FLOPs; a PF-day is 1e15 FLOP/s for a day."""
_NO_NATS = {
    "the logarithm of a perplexity is the loss": re.compile(r"(^|_)(ppl|perplexity)(_|$)"),
    "bits per byte are not nats per token; only laws of tasks take them: bigtrain scaling tasks": re.compile(
        r"(^|_)(bpb|bits_per_byte)(_|$)"
    ),
}
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
        hint = next(
            (f"; {text}" for text, form in _NO_NATS.items() if any(form.search(_plain(name)) for name in raw)), ""
        )
        raise UserError(
            "There is no column of losses", source, f"Name it with --loss; the columns are {_list(raw)}{hint}."
        )
    for name, column in found.items():
        factor = _factor(name, column)
        given = {"params": named.params_unit, "tokens": named.tokens_unit}.get(name)
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
    plain = {name: _plain(name) for name in raw}
    return RunTable(
        run=texts(raw[found["run"]]) if "run" in found else tuple(place), group=group, params=numbers["params"],
        tokens=numbers["tokens"], flops=numbers["flops"], loss=numbers["loss"], place=tuple(place), source=source,
        notes=tuple(notes), params_derived=params_derived, flops_exact=flops_exact, bad=tuple(bad),
        units_confirmed=named.params_unit is not None or named.tokens_unit is not None,
        identity=tuple(name for name in raw if plain[name] in _NAMES_A_RUN or plain[name].startswith("_")),
        raw={name: tuple(column) for name, column in raw.items()}, **optional,
    )  # fmt: skip


_OPTIONAL = ("params_without_embeddings", "lr", "batch", "unique_tokens")
_NUMERIC = ("params", "tokens", "flops", "loss", "ratio", *_OPTIONAL)


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


def _factor(wanted: str, column: str) -> float:
    """The unit of a column in parameters, tokens or FLOPs, by its name: 1e9 for "params_B" and "N (B)", otherwise 1."""
    name = _plain(column)
    if wanted == "flops":
        return _FLOP_UNITS.get(name, 1.0)
    match = _UNIT.fullmatch(name)
    if wanted not in ("params", "tokens", "unique_tokens") or match is None:
        return 1.0
    base, unit = match["base"], match["unit"]
    # After a single letter the unit must be in brackets: "d_b" may mean anything, but "D (B)" is a unit.
    known = base in _KNOWN[wanted] and (len(base) > 1 or re.search(r"[(\[]", column) is not None)
    return _UNITS[unit[0]] if known else 1.0


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _find(raw: Mapping[str, Sequence[object]], source: str, named: ColumnNames) -> tuple[dict[str, str], list[str]]:
    plain = {_plain(name): name for name in reversed(list(raw))}
    found, notes = {}, []
    for wanted, guesses in _KNOWN.items():
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
        matches = [plain[guess] for guess in guesses if guess in plain]
        matches += [name for name in raw if name not in matches and _factor(wanted, name) != 1]
        if wanted == "loss":
            matches = list(dict.fromkeys([*matches, *_losses(plain)]))
        if matches:
            found[wanted] = matches[0]
            several = wanted in ("params", "loss") and len(matches) > 1
            others = f" (not {', '.join(matches[1:])})" if several else ""
            if wanted in ("params", "tokens", "flops", "loss"):
                notes.append(f"{wanted} is column '{matches[0]}'{others}")
    return found, notes


def _losses(plain: Mapping[str, str]) -> list[str]:
    """Columns whose names look like losses, held-out losses first."""
    known = [name for name in reversed(list(plain)) if not _NO_LOSS.search(name)]
    return [plain[name] for pattern in _LOSS_LIKE for name in known if pattern.search(name)]


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
        number = parse_number(value)
        if number is None and name not in (*_OPTIONAL, "ratio"):
            bad[i] = bad[i] or f"{value!r} in column '{column}'"
        out[i] = np.nan if number is None else number
    return out


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
