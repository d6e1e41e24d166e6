"""The plan as an HTML page: headline numbers, terms of memory and time, executions, and other numbers of GPUs."""

from __future__ import annotations

from typing import Any

from bigtrain.planning.report import GIB, LIMITS, axes_text, numbers_text, terms_text
from bigtrain.tracking.numbers import short
from bigtrain.tracking.page import Chart, Fact, Page, Series

MEMORY_PARTS = {
    "parameters, gradients, optimizer": ("parameters", "gradients", "optimizer"),
    "gathered and whole gradients": ("gathered", "gradient_buffers"),
    "activations": ("activations", "working"),
    "logits and runtime": ("logits", "runtime"),
}
TIME_PARTS = {
    "matrix products and attention": ("matmul", "attention"),
    "memory-bound, optimizer, host": ("memory_bound", "optimizer", "launch"),
    "exchanges": ("tensor_and_context", "pipeline_messages", "sharding"),
    "pipeline idle": ("bubble",),
}


def plan_page(document: dict[str, Any], name: str) -> str:
    """The HTML page of a plan.

    Args:
        document: The result of `report.plan_document`.
        name: Name of the run, for the title.
    """
    best = document["executions"][0]
    subtitle = (
        f"{short(document['parameters'])} parameters on {document['gpus']} x {document['device']}, "
        f"{short(document['batch_tokens'])} tokens a step"
    )
    page = Page(f"Plan of {name}", subtitle)
    if not document["fits"]:
        page.heading("Nothing fits")
        for line in document["would_have_to_give"]:
            page.note(line)
    page.headline([Fact(label, value) for label, value in numbers_text(best).items()])
    page.note(axes_text(best))
    for line in document["why"]:
        page.note(line)
    memory, seconds = best["memory_bytes"], best["seconds"]
    page.heading("Memory of the fullest GPU")
    page.shares(_parts(MEMORY_PARTS, memory, lambda size: f"{size / GIB:.1f} GiB"))
    page.heading("Time of a step")
    page.shares(_parts(TIME_PARTS, seconds, lambda value: f"{value:.3g} s"))
    page.table(("term", "amount", "share"), terms_text(best))
    page.heading("Executions")
    rows = [(axes_text(one), *list(numbers_text(one).values())[:4]) for one in document["executions"]]
    page.table(("execution", "step", "memory", "tokens/s", "MFU"), rows, long=("execution",))
    points = [point for point in document["sweep"] if point["fits"]]
    if points:
        page.heading("More and fewer GPUs")
        page.charts(_charts(points))
        shown = [(point["gpus"], axes_text(point), *numbers_text(point).values()) for point in points]
        page.table(("GPUs", "execution", *numbers_text(points[0])), shown, long=("execution",))
    page.note(f"MFU: {document['mfu_convention']}. What limits the best: {LIMITS[best['limited_by']]}.")
    return page.render()


def _parts(groups: dict[str, tuple[str, ...]], values: dict[str, Any], text: Any) -> list[tuple[str, float, str]]:
    sums = {label: sum(values[name] for name in names) for label, names in groups.items()}
    return [(label, amount, text(amount)) for label, amount in sums.items()]


def _charts(points: list[dict[str, Any]]) -> list[Chart]:
    gpus = [point["gpus"] for point in points]
    charts = [
        Chart(
            "Tokens a second", [Series("tokens/s", gpus, [point["tokens_per_s"] for point in points])],
            x_title="GPUs", log_x=True, log_y=True,
        ),
        Chart("MFU", [Series("MFU", gpus, [point["mfu"] for point in points])], x_title="GPUs", log_x=True),
    ]  # fmt: skip
    if "days" in points[0]:
        days = [point["days"] for point in points]
        charts.append(Chart("Days", [Series("days", gpus, days)], x_title="GPUs", log_x=True, log_y=True))
        if points[0]["usd"] is not None:
            usd = [point["usd"] for point in points]
            charts.append(Chart("Cost", [Series("cost", gpus, usd)], "$", x_title="GPUs", log_x=True, from_zero=True))
    return charts
