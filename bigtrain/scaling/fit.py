"""`bigtrain scaling fit`: fit a scaling law to a table of runs by three approaches, with intervals and diagnostics."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

import bigtrain
from bigtrain.config import UserError
from bigtrain.scaling.agreement import agreement
from bigtrain.scaling.approaches import run_approaches
from bigtrain.scaling.backtest import REPLICATES, Prediction
from bigtrain.scaling.clustering import choose_clusters
from bigtrain.scaling.document import FORMAT_VERSION, KIND, finite
from bigtrain.scaling.form_fit import form_result, predict_rest
from bigtrain.scaling.forms import Form
from bigtrain.scaling.frontier import frontier_document
from bigtrain.scaling.judge import hold_out, judge, near_frontier, warnings_of
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray
from bigtrain.scaling.options import FitOptions
from bigtrain.scaling.overlap import overlap_of
from bigtrain.scaling.runs.readers import IN_MEMORY, RunSource, read_source
from bigtrain.scaling.runs.selection import best_settings, last_points, other_settings, undecayed, without_copies
from bigtrain.scaling.runs.table import RunTable
from bigtrain.scaling.runs.units import check_values
from bigtrain.scaling.runs.where import where as select
from bigtrain.storage import hash_file

DEFAULT_TARGET = 10.0
"""FLOPs of the default target, as a multiple of the largest run's FLOPs."""


@dataclass(frozen=True)
class Fitted:
    """A law and the runs that it was fitted to."""

    law: dict[str, Any]
    """The content of law.json."""
    table: RunTable


def fit(source: RunSource, options: FitOptions | None = None, say: Callable[[str], None] = lambda text: None) -> Fitted:
    """Read and check a table of runs, and fit the law by each approach that the options name.

    Args:
        source: A file, a directory, or a table such as a pandas DataFrame; see `readers.read_source`.
        options: Approaches, selection of runs, target and bootstrap.
        say: A function that prints a line of progress.

    Raises:
        UserError: The input is bad, or the chosen approach cannot be fitted to these runs. With approach "all" such an
            approach is reported as refused, and only the refusal of every approach is an error.
    """
    options = options or FitOptions()
    form = Form.parse(options.form) if options.form is not None else None
    say(f"reading {source if isinstance(source, str) else IN_MEMORY}")
    read, table, odd = prepare(source, options)
    target = _target(table, options)
    clusters, kind, warnings = choose_clusters(table, options)
    options = replace(options, cluster=kind)  # type: ignore[arg-type]
    say(f"fitting {len(table)} runs")
    found = run_approaches(table, clusters, target, options)
    residuals: FloatArray | None = None
    if form is not None:
        say(f"fitting {form.text}")
        own, residuals = form_result(form, table, clusters, target, options)
        found = {"form": own, **found}
    names = [name for name, one in found.items() if "refused" not in one.result]
    primary = next((name for name in names if name == "form" or name.startswith("a3")), names[0])
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "kind": KIND, "primary": primary, "target_flops": target,
        "approaches": {name: one.result for name, one in found.items()},
        "agreement": agreement(found), "held_out": None, "back_tests": [], "misfit": None, "diagnostics": None,
        "frontier": {}, "warnings": [*odd, *warnings, *warnings_of(table, clusters, found, options)],
        "source": _source(read, table, options), "data": _data(table, clusters),
        "options": {**asdict(options), "processes": None}, "seed": options.seed,
        "versions": {
            "bigtrain": bigtrain.__version__, "python": platform.python_version(), "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
    }  # fmt: skip
    for name, one in found.items():
        if one.frontier is not None:
            curve = one.frontier
            document["frontier"][name] = frontier_document(
                curve.flops, curve.loss, curve.replicates, target, options.seed
            )
    say("holding out the largest runs")
    if form is not None and residuals is not None:
        _judge_form(form, document, table, clusters, residuals, options)
    elif (fitted := found[primary].fitted) is not None:
        residuals = fitted.residuals
        judge(document, table, clusters, fitted, options)
    if residuals is not None:
        document["residuals"] = {"params": table.params, "tokens": table.tokens, "ln_measured_over_law": -residuals}
    document["overlap"], more = overlap_of(source, options.overlap)
    document["warnings"] += more
    return Fitted(finite(document), table)


def _judge_form(
    form: Form, document: dict[str, Any], table: RunTable, clusters: npt.NDArray[np.int64], residuals: FloatArray,
    options: FitOptions,
) -> None:  # fmt: skip
    """Add the back-tests of the user's own form to the document, and warnings about runs near the frontier."""

    def predict(few: RunTable, members: npt.NDArray[np.int64]) -> Prediction:
        return predict_rest(form, options.delta, few, members, table, options.seed, REPLICATES)

    hold_out(document, table, clusters, options.seed, predict, len(form.constants))
    document["warnings"] += near_frontier(table, residuals)


def prepare(source: RunSource, options: FitOptions) -> tuple[RunTable, RunTable, list[str]]:
    """The table as it was read, the rows that are fitted, and warnings about odd rows.

    Args:
        source: See `readers.read_source`.
        options: The selection of runs and the treatment of copies and swept settings.

    Raises:
        UserError: The source cannot be read, or its values cannot be fitted.
    """
    read = read_source(source, options.columns)
    table = select(read, options.where) if options.where else read
    if options.drop_highest:
        table = table.drop_highest(options.drop_highest)
    odd = check_values(table)
    selected = table.notes
    if options.points == "last":
        table = last_points(table)
    table, copies = without_copies(table, options.duplicates)
    table, best = best_settings(table, options.swept, options.edges)
    odd += [*undecayed(table), *other_settings(table)]
    return replace(read, notes=(*selected, *copies, *best)), table.ordered(), odd


def _target(table: RunTable, options: FitOptions) -> float:
    largest = float(table.flops.max())
    if options.target_flops is None:
        return DEFAULT_TARGET * largest
    if not math.isfinite(options.target_flops) or options.target_flops <= largest:
        raise UserError(
            f"The target of {options.target_flops:.4g} FLOPs lies inside the data, which reaches {largest:.4g}: no law "
            "is needed there", "--target-flops", f"Give more than {largest:.4g}, or no target (ten times that).",
        )  # fmt: skip
    return options.target_flops


def _source(read: RunTable, used: RunTable, options: FitOptions) -> dict[str, Any]:
    path = Path(read.source)
    return {
        "name": read.source, "file_hash": hash_file(path) if path.is_file() else None, "data_hash": used.digest(),
        "rows_read": len(read), "rows_used": len(used), "where": options.where, "drop_highest": options.drop_highest,
        "notes": list(read.notes),
    }  # fmt: skip


def _data(table: RunTable, clusters: npt.NDArray[np.int64]) -> dict[str, Any]:
    ratio = table.tokens / table.params

    def span(values: FloatArray) -> list[float]:
        return [float(values.min()), float(values.max())]

    return {
        "runs": len(table), "models": len(set(table.group)), "clusters": int(clusters.max()) + 1,
        "params": span(table.params), "tokens": span(table.tokens), "flops": span(table.flops),
        "loss": span(table.loss), "tokens_per_param": span(ratio),
        "flops_over_6nd": span(table.flops / (FLOPS_PER_PARAMETER_TOKEN * table.params * table.tokens)),
        "phase": next(iter(table.phase), None) or None,
    }  # fmt: skip
