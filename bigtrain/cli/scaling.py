"""The commands `bigtrain scaling`: fit scaling laws and predict losses."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bigtrain.cli.common import Json, errors, show

app = typer.Typer(help="Fit scaling laws to runs, compare recipes, and predict.", no_args_is_help=True)

Column = typer.Option(metavar="COL", help="Name of the column; default: guessed, and reported.")
Unit = typer.Option(metavar="UNIT", help="Unit of the column: M, B, ..., or 1, which also skips the check.")
Where = typer.Option(help='Which runs: "tokens / params > 10 and (phase == decayed or lr < 1e-3)".')
Number = typer.Option(metavar="NUMBER", help="A number such as 7B, 1.4T or 1e21.")
Duplicates = Annotated[
    Literal["refuse", "drop", "keep"], typer.Option(help="What happens if two rows are the same run.")
]
Swept = Annotated[
    Literal["best", "all"], typer.Option(help="Rows to fit if learning rate or batch are swept at one N and D.")
]
Edges = Annotated[
    Literal["refuse", "drop", "keep"], typer.Option(help="What happens if the best value is at the edge of its grid.")
]
Points = Annotated[Literal["all", "last"], typer.Option(help="Rows to fit of runs that have several rows.")]
Form = Annotated[
    str | None,
    typer.Option(metavar="EXPR", help='"repeats", or a law of your own in N, D, U and constants: "E + A / N**a".'),
]
Approach = Annotated[
    Literal["a1", "a2", "a3", "all"], typer.Option(help="Approaches: 1 envelope, 2 IsoFLOP, 3 parametric.")
]
LossFunction = Annotated[
    Literal["huber", "l1", "squares"] | None, typer.Option(help="Objective of approach 3; default: all three.")
]
Cluster = Annotated[Literal["auto", "model", "none"], typer.Option(help="Rows that the bootstrap resamples together.")]


@app.command("fit")
def scaling_fit(
    source: Annotated[str, typer.Argument(help="A .csv or .jsonl file, a sweep, W&B files, wandb:ENTITY/PROJECT.")],
    out: Annotated[Path, typer.Option(help="Output directory; gets law.json, law.html and law.svg.")],
    params: Annotated[str | None, Column] = None,
    tokens: Annotated[str | None, Column] = None,
    flops: Annotated[str | None, Column] = None,
    loss: Annotated[str | None, Column] = None,
    group: Annotated[str | None, Column] = None,
    lr: Annotated[str | None, Column] = None,
    batch: Annotated[str | None, Column] = None,
    params_unit: Annotated[str | None, Unit] = None,
    tokens_unit: Annotated[str | None, Unit] = None,
    drop_highest: Annotated[int, typer.Option(min=0, help="Number of rows with the highest losses to exclude.")] = 0,
    where: Annotated[str | None, Where] = None,
    duplicates: Duplicates = "refuse",
    swept: Swept = "best",
    edges: Edges = "refuse",
    points: Points = "all",
    approach: Approach = "all",
    loss_function: LossFunction = None,
    delta: Annotated[float, typer.Option(help="Delta of Huber's loss, on the log of the loss.")] = 1e-3,
    cluster: Cluster = "auto",
    target_flops: Annotated[str | None, Number] = None,
    equal_exponents: Annotated[bool, typer.Option("--equal-exponents", help="Fit with alpha = beta.")] = False,
    form: Form = None,
    overlap: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Result of `data overlap`; default: the one stored with a sweep's data."),
    ] = None,
    replicates: Annotated[int, typer.Option(min=100, help="Number of bootstrap samples.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap and of the starting points.")] = 0,
    wandb: Annotated[bool, typer.Option("--wandb", help="Also record the law as a W&B run.")] = False,
    as_json: Json = False,
) -> None:
    """Fit a scaling law by three approaches, with confidence intervals."""
    with errors(as_json):
        from bigtrain.config import UserError

        if not (math.isfinite(delta) and delta > 0):
            raise UserError(f"--delta must be a positive number, not {delta}", "command line")
        from bigtrain.scaling.fit import fit
        from bigtrain.scaling.options import FitOptions
        from bigtrain.scaling.report import write_outputs
        from bigtrain.scaling.runs.columns import ColumnNames

        columns = ColumnNames(
            params, tokens, flops, loss, group, _unit("params-unit", params_unit), _unit("tokens-unit", tokens_unit),
            lr, batch,
        )  # fmt: skip
        options = FitOptions(
            columns, drop_highest, where, approach, loss_function, delta, cluster,
            number("target-flops", target_flops), equal_exponents, replicates, seed,
            duplicates=duplicates, swept=swept, edges=edges, points=points, form=form, overlap=overlap,
        )  # fmt: skip
        fitted = fit(source, options, progress)
        from bigtrain.tracking.config import TrackingConfig

        files = write_outputs(fitted, out, TrackingConfig() if wandb else None)
        show({**_slim(fitted.law), "files": [str(file) for file in files]}, as_json, _fit_text)


def _slim(law: dict[str, Any]) -> dict[str, Any]:
    """A law without the replicates of its bootstrap."""

    def one(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: one(item) for name, item in value.items() if name != "replicates"}
        return value

    return dict(one(law))


def progress(text: str) -> None:
    """Print the current phase to stderr, if it is a terminal."""
    if sys.stderr.isatty():
        print(f"{text} ...", file=sys.stderr, flush=True)


def number(name: str, text: str | None) -> float | None:
    """Parse the number of an option, which may have a suffix, such as 7B; None if the option is not given.

    Raises:
        UserError: The text is not a positive, finite number.
    """
    from bigtrain.config import UserError
    from bigtrain.scaling.runs.numbers import parse_number

    if text is None:
        return None
    value = parse_number(text)
    if value is None or not (math.isfinite(value) and value > 0):
        raise UserError(
            f"--{name} must be a positive number, not {text}", "command line", "Write for example 7B or 1e21."
        )
    return value


def _unit(name: str, text: str | None) -> float | None:
    return number(name, f"1{text}" if text is not None and not text[:1].isdigit() else text)


@app.command("predict")
def scaling_predict(
    law: Annotated[Path, typer.Argument(help="File law.json, or its directory.")],
    flops: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Compute budget; default: the law's target.")
    ] = None,
    params: Annotated[str | None, typer.Option(metavar="NUMBER", help="Parameters N; default: the optimum.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="NUMBER", help="Tokens D; default: the optimum.")] = None,
    as_json: Json = False,
) -> None:
    """Print the best model size and number of tokens for a compute budget, and the predicted loss."""
    with errors(as_json):
        from bigtrain.scaling.document import read_law
        from bigtrain.scaling.predict import predict

        result = predict(
            read_law(law), number("flops", flops), number("params", params), number("tokens", tokens)
        )  # fmt: skip
        show(result, as_json, _predict_text)


def _fit_text(result: dict[str, Any]) -> str:
    text = [*result["source"]["notes"], f"{result['source']['rows_used']} of {result['source']['rows_read']} rows"]
    for name, one in result["approaches"].items():
        if "refused" in one:
            text.append(f"{name:10}  not fitted: {one['refused']}")
            continue
        if name == "form":
            law = "  ".join(f"{key} {value:.5g}" for key, value in one["constants"].items())
            text.append(f"form        {one['expression']}: {law}")
            text += [f"            {key} 95 % [{low:.5g}, {high:.5g}]" for key, (low, high) in one["interval"].items()]
            continue
        law = "  ".join(f"{key} {one[key]:.5g}" for key in ("A", "B", "E", "alpha", "beta") if key in one)
        text.append(f"{name:10}  {law}  N* ~ C^{one['a']:.4f}  D* ~ C^{one['b']:.4f}".replace("    ", "  "))
        if "window_sensitivity" in one:
            moved = ", ".join(
                f"{row['window']} {row['a']:.4f}" for row in one["window_sensitivity"] if row["a"] is not None
            )
            text += [f"            windows: {one['window_rule']}", f"            a by other windows: {moved}"]
    for name, one in result["frontier"].items():
        if one:
            text.append(
                f"frontier    {name}: {one['E']:.4f} + {one['A']:.4g} (C / {one['unit_flops']:.3g})^-{one['a']:.4f}, "
                f"{one['target']['loss']:.5f} [{one['target']['interval'][0]:.5f}, {one['target']['interval'][1]:.5f}] "
                f"at {one['target']['flops']:.3g} FLOPs"
            )
    text += _back_tests(result)
    target = result["approaches"][result["primary"]]["target"]
    text.append(f"at {result['target_flops']:.3g} FLOPs ({result['primary']})")
    text += [f"  {line}" for line in quantities(target)]
    if result["agreement"]["agree"] is not None:
        text.append(f"the approaches {'agree' if result['agreement']['agree'] else 'DISAGREE'}")
    text += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join([*text, *result["files"]])


def _back_tests(result: dict[str, Any]) -> list[str]:
    tests = [(result["primary"], one) for one in result["back_tests"]]
    tests += [(f"frontier {name}", one) for name, law in result["frontier"].items() if law for one in law["back_tests"]]
    return [
        f"back-test   {name}, {one['factor']:.1f} times the fitted FLOPs: predicted {one['predicted']:.5f} "
        f"[{one['prediction_interval'][0]:.5f}, {one['prediction_interval'][1]:.5f}], measured {one['measured']:.5f}, "
        f"error {one['error']:+.2%}"
        for name, one in tests
    ]


def quantities(values: dict[str, Any]) -> list[str]:
    from bigtrain.scaling.runs.numbers import count, nats

    names = {"params": "N*", "tokens": "D*", "tokens_per_param": "D/N", "loss": "loss"}
    out = []
    for name, label in names.items():
        if name in values:
            low, high = values[name]["interval"]
            shown = nats if name == "loss" else count
            out.append(f"{label:5} {shown(values[name]['value'])}  95 % [{shown(low)}, {shown(high)}]")
    return out


def _predict_text(result: dict[str, Any]) -> str:
    from bigtrain.scaling.runs.numbers import count, nats

    text = [
        f"{result['flops']:.4g} FLOPs, {result['times_largest_run']:.3g} times the largest run ({result['approach']})"
    ]
    text += quantities(result["optimal"])
    if chosen := result.get("chosen"):
        text += [
            f"at N {count(chosen['params'])}, D {count(chosen['tokens'])} (D/N {chosen['tokens_per_param']:.3g}):",
            *(f"  {line}" for line in quantities({"loss": chosen["loss"]})),
            f"  {chosen['excess_loss']['value']:+.5f} above the optimum"
            + (
                f": a compute-optimal run reaches it with 1/{price['value']:.3g} of the FLOPs"
                if (price := chosen["flops_price"])
                else ""
            ),
        ]
    if run := result.get("next_run"):
        text.append(
            f"next run: N {count(run['params'])}, D {count(run['tokens'])} ({run['flops']:.3g} FLOPs, expected loss "
            f"{nats(run['expected_loss'])}) narrows the loss's interval to {run['interval_width_factor']:.0%}"
        )
    return "\n".join([*text, *(f"warning: {warning}" for warning in result["warnings"])])
