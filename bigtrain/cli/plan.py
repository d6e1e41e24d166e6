"""`bigtrain plan` and `bigtrain prove`: predict memory, time and cost of a run's layouts, and verify a layout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import Json, Overrides, PluginOption, errors, load, show

app = typer.Typer()


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs; default: from the file's section `job`.")
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="An entry (a100, h100, h200, b200, mi300x, cpu) or a YAML file.")
    ] = "h100",
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Size of the vocabulary, if the data is not on this machine.")
    ] = None,
    sweep_gpus: Annotated[
        str | None, typer.Option(metavar="A..B", help="Also plan each doubling of GPUs from A to B.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Price of one GPU for one hour, in US dollars.")] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file that the best execution is written to.")] = None,
    page: Annotated[Path | None, typer.Option(help="HTML page that the plan is written to.")] = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Do not search: run the code of the file's own execution on fake tensors."),
    ] = False,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Find the best layout of a run for a number of GPUs: whether it fits, how fast it is, what it costs, and why."""
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.hardware.cluster import cluster
        from bigtrain.planning.estimate import Job
        from bigtrain.planning.page import plan_page
        from bigtrain.planning.report import execution_yaml, plan_document, plan_text

        loaded = load(config, overrides, plugin=plugin)
        count = gpus or loaded.job.nodes * _procs(loaded)
        if rehearse:
            _rehearse(loaded, vocab_size or vocabulary(loaded), count, as_json)
            return
        on = cluster(hardware)
        if price is not None:
            on = type(on).model_validate({**on.plain(), "usd_per_hour": price})
        job = Job.of(loaded, vocab_size or vocabulary(loaded))
        document = plan_document(job, on, count, tokens_of(loaded, job), _doublings(sweep_gpus))
        if out is not None:
            if not document["fits"]:
                raise UserError("No execution fits, so none is written", str(out), document["would_have_to_give"][0])
            out.write_text(execution_yaml(document, on.per_node), encoding="utf-8")
            print(f"wrote {out}", file=sys.stderr)
        if page is not None:
            page.write_text(plan_page(document, loaded.name), encoding="utf-8")
            print(f"wrote {page}", file=sys.stderr)
        show(document, as_json, plan_text)
    if not document["fits"]:
        raise typer.Exit(1)


def _rehearse(config: Any, outputs: int, count: int, as_json: bool) -> None:
    from bigtrain.planning.rehearsal import rehearsal_text, rehearse

    document = rehearse(config, outputs, count)
    show(document, as_json, rehearsal_text)
    if document["faults"]:
        raise typer.Exit(1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def prove(context: typer.Context) -> None:
    """Compare a small copy of a run's model, in its layout on CPU processes, with one process; --help shows options."""
    os.execv(sys.executable, [sys.executable, "-m", "bigtrain.testing.prove", *context.args])


def vocabulary(config: Any) -> int:
    """Number of entries of the vocabulary, from the run's data.

    Raises:
        UserError: The data cannot be read.
    """
    from bigtrain.config import UserError
    from bigtrain.training.prepare import prepare

    try:
        return prepare(config, verify=False).outputs
    except (UserError, OSError) as error:
        what = error.what if isinstance(error, UserError) else str(error)
        raise UserError(
            f"The size of the vocabulary is not known without the data: {what}", "data.train", "Give --vocab-size N."
        ) from None


def tokens_of(config: Any, job: Any) -> float | None:
    """Number of tokens of the full run; None if its duration is in epochs, as the data is not read."""
    step = job.batch * job.model.context
    try:
        return float(config.duration.in_steps(step, job.batch, None) * step)
    except ValueError:
        return None


def _procs(config: Any) -> int:
    procs = config.job.procs_per_node
    return procs if isinstance(procs, int) else 1


def _doublings(text: str | None) -> list[int]:
    from bigtrain.config import UserError

    if text is None:
        return []
    first, dots, last = text.partition("..")
    if not dots or not first.isdigit() or not last.isdigit() or not 0 < int(first) <= int(last):
        raise UserError(f"{text!r} is not a range of GPU counts", "--sweep-gpus", "Write for example 8..16384.")
    sizes = [int(first)]
    while sizes[-1] * 2 <= int(last):
        sizes.append(sizes[-1] * 2)
    return sizes
