"""The `bigtrain scaling` commands for decisions: task accuracy, comparisons, forecasts, learning rates and muP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bigtrain.cli.common import RUNS, Json, Overrides, PluginOption, RunName, RunsDir, errors, load_plugins, show
from bigtrain.cli.scaling import Column, number, progress, quantities


def register(app: typer.Typer) -> None:
    """Add these commands to `bigtrain scaling`."""
    app.command("tasks")(scaling_tasks)
    app.command("compare")(scaling_compare)
    app.command("preregister")(scaling_preregister)
    app.command("rates")(scaling_rates)
    app.command("coordinate-check")(scaling_coordinate_check)


def scaling_tasks(
    source: Annotated[str, typer.Argument(help="Checkpoints of a ladder: a .csv or .jsonl file, or a sweep.")],
    at_params: Annotated[str, typer.Option(metavar="NUMBER", help="Parameters N to predict for.")],
    at_tokens: Annotated[str, typer.Option(metavar="NUMBER", help="Tokens D to predict for.")],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LOSS:ACCURACY", help="Columns of a task; default: NAME_bpb and NAME_accuracy."),
    ] = None,
    where: Annotated[str | None, typer.Option(help='Which rows: "role == ladder".')] = None,
    out: Annotated[Path | None, typer.Option(help="Output directory; gets tasks.json.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Predict the accuracy of tasks at a model size N and token count D, by two laws in a chain."""
    with errors(as_json):
        from bigtrain.scaling.decide import predict_tasks

        n, d = number("at-params", at_params), number("at-tokens", at_tokens)
        assert n is not None
        assert d is not None
        show(predict_tasks(source, n, d, task or [], where, out, seed), as_json, _tasks_text)


def _tasks_text(result: dict[str, Any]) -> str:
    text = list(result["notes"])
    for one in result["tasks"]:
        low, high = one["accuracy"]["interval"]
        text += [
            f"{one['task']}: {one['runs']} runs, accuracy {one['accuracy']['value']:.4f}  95 % [{low:.4f}, {high:.4f}]",
            *(f"  {line}" for line in quantities({"loss": one["loss"]})),
        ]
    return "\n".join([*text, *result["files"]])


def scaling_compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Runs of recipe A: a sweep, or a table.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Runs of recipe B at the same sizes and lengths.")],
    out: Annotated[Path | None, typer.Option(help="Output directory; gets compare.json and compare.html.")] = None,
    target_flops: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Target compute; default: ten times the largest run's.")
    ] = None,
    equal: Annotated[
        Literal["flops", "tokens", "time"], typer.Option(help="Cost at which the recipes are compared.")
    ] = "flops",
    paired: Annotated[
        bool | None,
        typer.Option("--paired/--unpaired", help="Whether runs with the same seed are pairs; default: if seeds match."),
    ] = None,
    where: Annotated[str | None, typer.Option(help="Condition on the rows of both tables.")] = None,
    where_a: Annotated[str | None, typer.Option(help='Condition on the rows of A: "recipe == old".')] = None,
    where_b: Annotated[str | None, typer.Option(help="Condition on the rows of B; A and B may be one table.")] = None,
    as_json: Json = False,
) -> None:
    """Estimate how many times recipe B's compute recipe A needs for the same loss, with an interval."""
    with errors(as_json):
        from bigtrain.scaling.decide import compare_recipes

        target = number("target-flops", target_flops)
        rows = [" and ".join(f"({one})" for one in (where, own) if one) or None for own in (where_a, where_b)]
        show(compare_recipes(first, second, target, equal, paired, rows, out), as_json, _compare_text)


def _compare_text(result: dict[str, Any]) -> str:
    from bigtrain.scaling.runs.numbers import count, nats

    first, second = result["names"]
    runs = f"{result['runs'][0]} and {result['runs'][1]} runs in {result['cells']} cells"
    how = "paired by seed" if result["paired"] else "not paired"
    text = [f"{first} (A) and {second} (B): {runs}, {how}, {result['clusters']} clusters"]
    for point in result["points"]:
        text.append(
            f"  N {count(point['params'][0]):>6} {count(point['params'][1]):>6}  D {count(point['tokens']):>6}  loss "
            f"{nats(point['loss'][0])} {nats(point['loss'][1])}  multiplier {point['multiplier']:.3f}"
        )
    for name, one in (("over the ladder", result["ladder"]), (f"at {result['target']['flops']:.3g} FLOPs",
                                                              result["target"])):  # fmt: skip
        low, high = one["interval"]
        text.append(f"multiplier of B over A {name}: {one['value']:.3f}  95 % [{low:.3f}, {high:.3f}]")
    text.append("resolved" if result["resolved"] else result["advice"])
    text += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join([*text, *result["files"]])


def scaling_preregister(
    law: Annotated[Path, typer.Argument(help="File law.json, or its directory.")],
    run: Annotated[Path, typer.Option("--run", metavar="CONFIG", help="YAML of the planned run.")],
    overrides: Overrides = None,
    name: RunName = None,
    count: Annotated[
        Literal["without_embeddings", "total"], typer.Option(help="Parameters that N counts in the law.")
    ] = "without_embeddings",
    tasks: Annotated[str | None, typer.Option(metavar="SOURCE", help="Checkpoints of a ladder, for tasks.")] = None,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Record a law's prediction for a run before it starts; status and report compare the run with it."""
    with errors(as_json):
        from bigtrain.sweeps.preregister import preregister_run

        load_plugins(plugin)
        found = preregister_run(law, run, overrides or [], name, runs_dir, count, tasks)
        show(found, as_json, _forecast_text)


def _forecast_text(result: dict[str, Any]) -> str:
    from bigtrain.scaling.runs.numbers import count

    text = [
        f"{result['run']}: N {count(result['params'])}, D {count(result['tokens'])}, {result['flops']:.3g} FLOPs, "
        f"{result['times_largest_run']:.3g} times the law's largest run",
        *quantities({"loss": result["loss"]}),
        f"curve: {result['curve_source']}",
        *(f"{one['task']}: accuracy {one['accuracy']['value']:.4f}" for one in result["tasks"]),
        f"law {result['law_hash'][:16]}, {result['created']}",
    ]
    return "\n".join([*text, *(f"warning: {one}" for one in result["warnings"]), *result["files"]])


def scaling_rates(
    source: Annotated[str, typer.Argument(help="Runs that sweep learning rate or batch: a table, or a tuned sweep.")],
    out: Annotated[Path | None, typer.Option(help="Output directory; gets rates.json and rates.html.")] = None,
    at_params: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Parameters N for which the best values are given.")
    ] = None,
    at_tokens: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Tokens D for which the best values are given.")
    ] = None,
    at_batch: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="Batch for which the best learning rate is given, in the source's unit."),
    ] = None,
    params: Annotated[str | None, Column] = None,
    tokens: Annotated[str | None, Column] = None,
    flops: Annotated[str | None, Column] = None,
    loss: Annotated[str | None, Column] = None,
    lr: Annotated[str | None, Column] = None,
    batch: Annotated[str | None, Column] = None,
    where: Annotated[str | None, typer.Option(help="Condition on the rows.")] = None,
    edges: Annotated[
        Literal["refuse", "drop"], typer.Option(help="What happens if the best value is at the edge of its grid.")
    ] = "refuse",
    as_json: Json = False,
) -> None:
    """Fit laws of the best learning rate and the best batch size, with confidence intervals."""
    with errors(as_json):
        from bigtrain.scaling.decide import fit_rates
        from bigtrain.scaling.runs.columns import ColumnNames

        columns = ColumnNames(params=params, tokens=tokens, flops=flops, loss=loss, lr=lr, batch=batch)
        wanted = {"params": number("at-params", at_params), "tokens": number("at-tokens", at_tokens),
                  "batch": number("at-batch", at_batch)}  # fmt: skip
        at = {name: value for name, value in wanted.items() if value is not None}
        show(fit_rates(source, columns, where, edges, at, out), as_json, _rates_text)


def _rates_text(result: dict[str, Any]) -> str:
    from bigtrain.scaling.rates import NAMES
    from bigtrain.scaling.rates_page import LETTERS, law_text
    from bigtrain.scaling.runs.numbers import count

    text = list(result["notes"])
    for setting, one in result["laws"].items():
        plain = one["law"]
        good = sum(not optimum["refused"] for optimum in one["optima"])
        text.append(f"{good} of {len(one['optima'])} grids of the {NAMES[setting]} have their optimum inside")
        text.append(f"  {law_text(setting, plain)}, one optimum within {plain['deviation']:.1%}")
        for name in plain["names"]:
            low, high = plain["exponents"][name]["interval"]
            text.append(f"  exponent of {LETTERS[name]}: {plain['exponents'][name]['value']:.4f}  95 % [{low:.4f}, "
                        f"{high:.4f}]")  # fmt: skip
        if best := result["best"].get(setting):
            where = ", ".join(f"{LETTERS[name]} {count(value)}" for name, value in result["at"].items())
            text.append(
                f"  at {where}: {best['value']:.4g}  95 % [{best['interval'][0]:.4g}, {best['interval'][1]:.4g}]"
            )
            if best["outside"]:
                text.append(f"  warning: {' and '.join(best['outside'])} lie outside the fitted runs")
    return "\n".join([*text, *result["files"]])


def scaling_coordinate_check(
    config: Annotated[Path, typer.Argument(help="A run's YAML, of a decoder.")],
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(metavar="W,W,...", help="Widths, two or more.")] = "64,128,256,512",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training at each width.")] = 5,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences per step; replaces batch.size.")] = 8,
    keep: Annotated[
        Literal["head_width", "heads"], typer.Option(help="What wider models have in common.")
    ] = "head_width",
    random_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="VOCAB", help="Train on random tokens of this vocabulary, not on the config's data."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output directory; gets coordinates.json and coordinates.svg.")
    ] = None,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Train a decoder at several widths for some steps, and report whether activations change equally, as in muP."""
    with errors(as_json):
        from bigtrain.run import load_config
        from bigtrain.scaling.coordinates import coordinates_text, judge, write_coordinates
        from bigtrain.training.coordinates import measure_coordinates

        load_plugins(plugin)
        loaded = load_config(config, [*(overrides or []), f"batch.size={sequences}"])
        measured = measure_coordinates(
            loaded, _widths(widths), steps, keep=keep, random_tokens=random_tokens, say=progress
        )
        result = judge(measured)
        result["files"] = [] if out is None else [str(path) for path in write_coordinates(result, out)]
        show(result, as_json, coordinates_text)


def _widths(text: str) -> list[int]:
    from bigtrain.config import UserError

    parts = text.split(",")
    found = sorted({int(part) for part in parts if part.strip().isdecimal() and int(part)})
    if len(found) < max(2, len(parts)):
        raise UserError(
            f"--widths must be two or more different widths, not {text}",
            "command line",
            "Write for example 64,128,256.",
        )
    return found
