"""The output of `bigtrain plan`: one document, which is printed as text or JSON, or written as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from bigtrain.config import UserError
from bigtrain.hardware.cluster import Cluster
from bigtrain.planning.cost import cost_of
from bigtrain.planning.estimate import Estimate, Job
from bigtrain.planning.search import Found, search, would_have_to_give
from bigtrain.tracking.numbers import short, span

FORMAT_VERSION = 1
GIB = 2**30
SHOWN = 5
MFU_CONVENTION = "attention counted in full, recomputed work not counted (PaLM, appendix B)"
LIMITS = {
    "matmul": "matrix products: the device is at work",
    "attention": "attention",
    "memory_bound": "memory bandwidth: norms, activations, loss",
    "launch": "the host, which starts kernels too slowly: larger micro-batches or engine.compile",
    "tensor_and_context": "exchanges of activations between ranks that share matrices or sequences",
    "pipeline_messages": "messages between stages",
    "bubble": "idle time of the pipeline: more micro-batches would help",
    "sharding": "gathers and reductions of the sharded model that nothing hides: a larger batch would help",
    "optimizer": "the optimizer's pass over its state",
}
"""Explanation of each term of a step's time, for the term that limits the step."""


def plan_document(job: Job, on: Cluster, gpus: int, tokens: float | None, sweep: Sequence[int] = ()) -> dict[str, Any]:
    """Search for executions, and describe them in plain values, for JSON.

    Args:
        tokens: Number of tokens of the run; None if it is not known, so that there is no cost.
        sweep: Other numbers of GPUs for which to find the best execution.

    Raises:
        UserError: No layout is legal, or the device does not support the precision; see `search`.
    """
    found = search(job, on, gpus)
    document: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": "bigtrain plan",
        "hardware": on.name,
        "device": on.device.name,
        "gpus": gpus,
        "parameters": job.model.parameter_count(job.vocab_size),
        "batch_tokens": job.batch * job.model.context,
        "run_tokens": tokens,
        "legal": found.legal,
        "too_large": found.too_large,
        "mfu_convention": MFU_CONVENTION,
        "executions": [_row(job, one, on, tokens) for one in _distinct(found)],
        "fits": found.best is not None,
        "would_have_to_give": would_have_to_give(found),
    }
    if found.best is None and found.tightest is not None:
        document["executions"] = [_row(job, found.tightest, on, tokens)]
    document["why"] = _why(document["executions"]) if found.best is not None else []
    document["sweep"] = [_point(job, on, size, tokens) for size in sweep]
    return document


def _distinct(found: Found) -> list[Estimate]:
    """The fastest execution of each mesh; at most `SHOWN` of them."""
    first: dict[Any, Estimate] = {}
    for one in found.ranked:
        first.setdefault(one.sizes, one)
    return list(first.values())[:SHOWN]


def _row(job: Job, one: Estimate, on: Cluster, tokens: float | None) -> dict[str, Any]:
    seconds = {name: value for name, value in one.seconds.plain().items() if name not in ("hidden", "total")}
    limit = max(seconds, key=lambda name: seconds[name] if name != "matmul" else 0.0)
    row: dict[str, Any] = {
        "execution": execution(one),
        "mesh": {axis: getattr(one.sizes, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")},
        "micro_batches": one.passes.count,
        "micro_batch": one.passes.sequences,
        "memory_bytes": one.memory.plain(),
        "memory_limit_bytes": one.limit_bytes,
        "fullest_stage": one.place,
        "step_s": one.seconds.total,
        "seconds": one.seconds.plain(),
        "limited_by": limit,
        "tokens_per_s": one.tokens_per_s,
        "mfu": one.mfu,
        "mfu_causal": one.mfu_causal,
    }
    if tokens is not None:
        cost = cost_of(job, one, on, tokens)
        row |= {
            "goodput": cost.goodput,
            "checkpoint_interval_s": cost.checkpoint_interval_s,
            "days": cost.days,
            "gpu_hours": cost.gpu_hours,
            "usd": cost.usd,
        }
    return row


def _point(job: Job, on: Cluster, gpus: int, tokens: float | None) -> dict[str, Any]:
    try:
        found = search(job, on, gpus)
    except UserError as error:
        return {"gpus": gpus, "fits": False, "why": error.what}
    if found.best is None:
        return {"gpus": gpus, "fits": False, "why": "does not fit the memory"}
    return {"gpus": gpus, "fits": True, **_row(job, found.best, on, tokens)}


def execution(one: Estimate) -> dict[str, Any]:
    """The keys of a run's YAML that select this execution; keys of the layout with default values are omitted."""
    layout = {
        key: value
        for key, value in one.layout.plain().items()
        if key in ("dp_replicate", "cp", "cp_kind", "pp", "pp_schedule", "pp_stages_per_rank", "tp", "micro_size")
    }
    kept = {key: value for key, value in layout.items() if value not in (1, None) or key == "micro_size"}
    if one.sizes.cp == 1:
        kept.pop("cp_kind", None)
    if one.sizes.pp == 1:
        kept.pop("pp_schedule", None)
    engine: dict[str, Any] = {"name": one.engine.name, "recompute": getattr(one.engine, "recompute", "none")}
    if one.engine.name == "deepspeed":
        engine["zero"] = getattr(one.engine, "zero", 0)
    return {"engine": engine, "layout": kept}


def _why(rows: list[dict[str, Any]]) -> list[str]:
    best = rows[0]
    lines = [f"what limits it: {LIMITS[best['limited_by']]}"]
    if len(rows) > 1:
        other = rows[1]
        slower = other["step_s"] / best["step_s"] - 1
        terms = {name: other["seconds"][name] - best["seconds"][name] for name in LIMITS}
        worst = max(terms, key=lambda name: terms[name])
        lines.append(f"the second best takes {slower:.1%} longer: it loses {terms[worst]:.3g} s of a step to {worst}")
    return lines


def execution_yaml(document: dict[str, Any], procs_per_node: int) -> str:
    """The keys of a run's YAML that select the best execution, as YAML text."""
    best = document["executions"][0]
    nodes = max(1, -(-document["gpus"] // procs_per_node))
    job = {"nodes": nodes, "procs_per_node": min(procs_per_node, document["gpus"])}
    return yaml.safe_dump({**best["execution"], "job": job}, sort_keys=False, default_flow_style=None)


def axes_text(row: dict[str, Any]) -> str:
    """The mesh, schedule, micro-batches and recompute of an execution, on one line."""
    axes = " ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1) or "one GPU"
    layout, engine = row["execution"]["layout"], row["execution"]["engine"]
    schedule = layout.get("pp_schedule", "")
    if "pp_stages_per_rank" in layout:
        schedule += f" x{layout['pp_stages_per_rank']}"
    zero = f", zero {engine['zero']}" if "zero" in engine else ""
    parts = [
        axes,
        schedule,
        f"{row['micro_batches']} x {row['micro_batch']} sequences",
        f"recompute {engine['recompute']}",
    ]
    return ", ".join(part for part in parts if part) + zero


def numbers_text(row: dict[str, Any]) -> dict[str, str]:
    """The headline numbers of an execution as text, by label, for the terminal and the page."""
    shown = {
        "step": f"{row['step_s']:.3g} s",
        "memory": f"{row['memory_bytes']['total'] / GIB:.1f} of {row['memory_limit_bytes'] / GIB:.1f} GiB",
        "tokens/s": short(row["tokens_per_s"]),
        "MFU": f"{row['mfu']:.1%} (causal {row['mfu_causal']:.1%})",
    }
    if "days" in row:
        shown["days"] = f"{row['days']:.3g}"
        shown["cost"] = "n/a" if row["usd"] is None else f"${short(row['usd'])}"
        shown["goodput"] = f"{row['goodput']:.1%}"
        shown["checkpoint every"] = span(min(row["checkpoint_interval_s"], 1e9))
    return shown


def terms_text(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, amount and share of each term of memory and time that is not negligible."""
    memory, seconds = row["memory_bytes"], row["seconds"]
    found = [
        (f"memory: {name}", f"{size / GIB:.2f} GiB", f"{size / memory['total']:.0%}")
        for name, size in memory.items()
        if name != "total" and size / memory["total"] >= 0.005
    ]
    for name, value in seconds.items():
        if name not in ("total", "hidden") and value / seconds["total"] >= 0.001:
            found.append((f"time: {name}", f"{value:.3g} s", f"{value / seconds['total']:.1%}"))
    return found


def plan_text(document: dict[str, Any]) -> str:
    """The document as text for a terminal."""
    rows = document["executions"]
    lines = [
        f"{short(document['parameters'])} parameters, {short(document['batch_tokens'])} tokens a step, on "
        f"{document['gpus']} x {document['device']}: {document['legal']} legal executions, "
        f"{document['too_large']} of them too large"
    ]
    if not document["fits"]:
        lines += ["nothing fits", *(f"  {line}" for line in document["would_have_to_give"])]
    for place, row in enumerate(rows):
        title = (
            ("best", "runner-up")[place] if document["fits"] and place < 2 else "smallest" if place == 0 else "other"
        )
        lines.append(f"{title:9}  {axes_text(row)}")
        if place < 2:
            lines += [f"  {name:16} {value}" for name, value in numbers_text(row).items()]
        else:
            lines.append(f"  {'step':16} {numbers_text(row)['step']}")
    lines += [f"why: {line}" for line in document["why"]]
    lines += [f"  {name:28} {amount:>10} {share:>6}" for name, amount, share in terms_text(rows[0])]
    lines.append(f"MFU: {document['mfu_convention']}")
    for point in document["sweep"]:
        if point["fits"]:
            shown = ", ".join(f"{name} {value}" for name, value in numbers_text(point).items())
            lines.append(f"{point['gpus']:6} GPUs  {axes_text(point)}: {shown}")
        else:
            lines.append(f"{point['gpus']:6} GPUs  {point['why']}")
    return "\n".join(lines)
