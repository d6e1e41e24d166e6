"""The HTML page of a sweep's plan, in one self-contained file."""

from __future__ import annotations

from typing import Any

from bigtrain.sweeps.proposals import proposal_lines
from bigtrain.tracking.numbers import short, span
from bigtrain.tracking.page import Chart, Fact, Mark, Page, Series


def plan_page(plan: dict[str, Any]) -> str:
    """The HTML of a plan.

    Args:
        plan: The result of `plan.make_plan`.
    """
    made = Page(title=plan["name"], subtitle="bigtrain sweep plan")
    if "grids" in plan:
        _grids(made, plan)
        return made.render()
    made.headline(_facts(plan))
    for warning in plan["warnings"]:
        made.note(f"Warning: {warning}.")
    made.heading("The grid")
    made.charts(_charts(plan))
    made.heading("The ladder")
    made.table(
        ["N", "with embeddings", "shape", "C/6ND", "batch, tokens", "lr", "beta2", "warm-up", "D/N", "epochs",
         "tokens/s", "deviations"],
        [_size(one) for one in plan["sizes"]], long=("shape", "deviations"),
    )  # fmt: skip
    _proposals(made, plan.get("proposals"))
    made.heading("The trials")
    made.table(
        ["trial", "kind", "N", "D", "steps", "from", "FLOPs of its own", "time"],
        [_trial(one) for one in plan["trials"]],
    )  # fmt: skip
    return made.render()


def _proposals(made: Page, found: dict[str, Any] | None) -> None:
    if found is None:
        return
    made.heading("Proposed learning rates and batches")
    for line in proposal_lines(found):
        made.note(line.strip())


def _facts(plan: dict[str, Any]) -> list[Fact]:
    cost, expected = plan["cost"], plan["expected"]
    low, high = expected["loss_interval"]
    time = span(cost["seconds"]) if cost["seconds"] is not None else "n/a"
    return [
        Fact("Runs", f"{len(plan['points'])}", f"{len(plan['sizes'])} sizes, {len(plan['trials'])} trials to do"),
        Fact("FLOPs", f"{cost['flops']:.3g}", f"{cost['saved']:.0%} less than separate runs"),
        Fact("Time", time, f"{plan['slots']} slots, {cost['time_by']}"),
        Fact("Money", f"{cost['usd']:,.2f} USD" if cost["usd"] is not None else "n/a"),
        Fact("Target", f"{plan['target_flops']:.3g}", "FLOPs"),
        Fact("Expected interval there", f"{expected['width']:.2%}", f"loss {low:.4f} to {high:.4f}, simulated"),
    ]


def _charts(plan: dict[str, Any]) -> list[Chart]:
    grid, compute = [], []
    for i, one in enumerate(plan["sizes"]):
        points = [point for point in plan["points"] if point["size"] == one["target"]]
        shade = i / max(len(plan["sizes"]) - 1, 1)
        name = f"{short(one['params'])} parameters"
        tokens = [point["tokens"] for point in points]
        flops = [point["flops"] for point in points]
        params = [point["params"] for point in points]
        grid.append(Series(name, params, tokens, points=True, ramp=shade))
        compute.append(
            Series(name, flops, [d / n for d, n in zip(tokens, params, strict=True)], points=True, ramp=shade)
        )
    return [
        Chart("Tokens against parameters", grid, "tokens", "parameters N", log_x=True, log_y=True, value_format=".3~s"),
        Chart("Tokens a parameter against compute", compute, "tokens a parameter", "FLOPs",
              [Mark(plan["target_flops"], "target")], log_x=True, log_y=True, value_format=".3~g"),
    ]  # fmt: skip


def _size(one: dict[str, Any]) -> list[str]:
    return [
        f"{one['params']:,}", f"{one['params_total']:,}",
        ", ".join(f"{key} {value}" for key, value in one["model"].items()),
        f"{one['flops_over_6n']:.2f}", f"{one['batch_tokens']:,}", lr_text(one), f"{one['beta2']:g}",
        f"{one['warmup_steps']}", ", ".join(f"{ratio:.3g}" for ratio in one["tokens_per_param"]),
        f"{one['epochs']:.2f}",
        short(one["tokens_per_s"]) if one["tokens_per_s"] else "n/a", "; ".join(one["deviations"]),
    ]  # fmt: skip


def lr_text(one: dict[str, Any]) -> str:
    """The learning rate of a size, and under muP also the learning rate of its hidden matrices."""
    return f"{one['lr']:g}" + (f", hidden {one['hidden_lr']:g}" if one["hidden_lr"] else "")


def _trial(one: dict[str, Any]) -> list[str]:
    source = f"{one['parent']}@{one['parent_step']}" if one["parent"] else "the seed"
    own = one["flops"] * (one["steps"] - one["parent_step"]) / one["steps"]
    return [
        one["name"], one["kind"], short(one["params"]), short(one["tokens"]), str(one["steps"]), source, f"{own:.3g}",
        span(one["seconds"]) if one["seconds"] is not None else "n/a",
    ]  # fmt: skip


def _grids(made: Page, plan: dict[str, Any]) -> None:
    best = plan["grids"][0]
    made.headline([
        Fact("Budget", f"{plan['budget_flops']:.3g}", "FLOPs"), Fact("Target", f"{plan['target_flops']:.3g}", "FLOPs"),
        Fact("Narrowest interval", f"{best['width']:.2%}", "of the loss at the target, simulated"),
    ])  # fmt: skip
    made.table(
        ["width", "FLOPs", "sizes", "D/N", "seeds"],
        [[f"{one['width']:.2%}", f"{one['flops']:.3g}", ", ".join(short(size) for size in one["sizes"]),
          ", ".join(f"{ratio:g}" for ratio in one["tokens_per_param"]), str(one["seeds"])] for one in plan["grids"]],
    )  # fmt: skip
