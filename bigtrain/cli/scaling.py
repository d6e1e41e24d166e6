"""Commands on scaling laws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bigtrain.cli.common import Json, errors, show

app = typer.Typer(help="Fit scaling laws to runs, and predict with them.", no_args_is_help=True)

Column = typer.Option(metavar="COL", help="A column's name; guessed and said where left out.")


@app.command("fit")
def scaling_fit(
    source: Annotated[str, typer.Argument(help="A .csv or .jsonl file, a sweep, W&B files, wandb:ENTITY/PROJECT.")],
    out: Annotated[Path, typer.Option(help="A directory; gets law.json, law.html and law.svg.")],
    params: Annotated[str | None, Column] = None,
    tokens: Annotated[str | None, Column] = None,
    flops: Annotated[str | None, Column] = None,
    loss: Annotated[str | None, Column] = None,
    group: Annotated[str | None, Column] = None,
    drop_highest: Annotated[int, typer.Option(min=0, help="Leave out the K highest losses.")] = 0,
    where: Annotated[str | None, typer.Option(help='Which runs: "flops < 1e21 and phase == decayed".')] = None,
    approach: Annotated[Literal["a1", "a2", "a3", "all"], typer.Option(help="Envelope, IsoFLOP, parametric.")] = "all",
    loss_function: Annotated[
        Literal["huber", "l1", "squares"] | None, typer.Option(help="Of approach 3; all three where left out.")
    ] = None,
    delta: Annotated[float, typer.Option(help="Huber's delta on the log loss.")] = 1e-3,
    cluster: Annotated[Literal["model", "none"], typer.Option(help="What the bootstrap keeps together.")] = "model",
    target_flops: Annotated[float | None, typer.Option(help="Ten times the largest run's where left out.")] = None,
    equal_exponents: Annotated[bool, typer.Option("--equal-exponents", help="Require alpha = beta.")] = False,
    replicates: Annotated[int, typer.Option(min=100, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap and the starts.")] = 0,
    wandb: Annotated[bool, typer.Option("--wandb", help="Record the law as a W&B run too.")] = False,
    as_json: Json = False,
) -> None:
    """Fit a scaling law three ways, with intervals."""
    with errors(as_json):
        from bigtrain.config import UserError

        if not (math.isfinite(delta) and delta > 0):
            raise UserError(f"--delta must be a positive number, not {delta}", "command line")
        from bigtrain.scaling.columns import ColumnNames
        from bigtrain.scaling.fit import FitOptions, fit
        from bigtrain.scaling.report import write_outputs

        options = FitOptions(
            ColumnNames(params, tokens, flops, loss, group), drop_highest, where, approach, loss_function, delta,
            cluster, target_flops, equal_exponents, replicates, seed,
        )  # fmt: skip
        fitted = fit(source, options)
        from bigtrain.tracking.config import TrackingConfig

        files = write_outputs(fitted, out, TrackingConfig() if wandb else None)
        law = {name: value for name, value in fitted.law.items() if name != "approaches"}
        approaches = {
            name: {key: value for key, value in one.items() if key != "replicates"}
            for name, one in fitted.law["approaches"].items()
        }
        result = {**law, "approaches": approaches, "files": [str(file) for file in files]}
        show(result, as_json, _fit_text)


@app.command("predict")
def scaling_predict(
    law: Annotated[Path, typer.Argument(help="A law.json, or the directory that holds it.")],
    flops: Annotated[float, typer.Option(help="The budget.")],
    params: Annotated[float | None, typer.Option(help="N, where it is not the optimal one.")] = None,
    tokens: Annotated[float | None, typer.Option(help="D, where it is not the optimal one.")] = None,
    as_json: Json = False,
) -> None:
    """Say what to train with a budget, and what loss it will reach."""
    with errors(as_json):
        from bigtrain.scaling.document import read_law
        from bigtrain.scaling.predict import predict

        show(predict(read_law(law), flops, params, tokens), as_json, _predict_text)


def _fit_text(result: dict[str, Any]) -> str:
    text = [*result["source"]["notes"], f"{result['source']['rows_used']} of {result['source']['rows_read']} rows"]
    for name, one in result["approaches"].items():
        if "refused" in one:
            text.append(f"{name:10}  refused: {one['refused']}")
            continue
        law = "  ".join(f"{key} {one[key]:.5g}" for key in ("A", "B", "E", "alpha", "beta") if key in one)
        text.append(f"{name:10}  {law}  N* ~ C^{one['a']:.4f}  D* ~ C^{one['b']:.4f}".replace("    ", "  "))
    held = result["held_out"] or {}
    if "error" in held:
        text.append(
            f"held out    {held['held_out']} runs, the largest {held['factor']:.1f} times the fitted FLOPs: predicted "
            f"{held['predicted']:.4f} [{held['prediction_interval'][0]:.4f}, {held['prediction_interval'][1]:.4f}], "
            f"measured {held['measured']:.4f}, error {held['error']:+.2%}"
        )
    target = result["approaches"][result["primary"]]["target"]
    text.append(f"at {result['target_flops']:.3g} FLOPs ({result['primary']})")
    text += [f"  {line}" for line in _quantities(target)]
    if result["agreement"]["agree"] is not None:
        text.append(f"the approaches {'agree' if result['agreement']['agree'] else 'DISAGREE'}")
    text += [f"warning: {warning}" for warning in result["warnings"]]
    return "\n".join([*text, *result["files"]])


def _quantities(values: dict[str, Any]) -> list[str]:
    names = {"params": "N*", "tokens": "D*", "tokens_per_param": "D/N", "loss": "loss"}
    out = []
    for name, label in names.items():
        if name in values:
            low, high = values[name]["interval"]
            out.append(f"{label:5} {values[name]['value']:.4g}  95 % [{low:.4g}, {high:.4g}]")
    return out


def _predict_text(result: dict[str, Any]) -> str:
    text = [
        f"{result['flops']:.4g} FLOPs, {result['times_largest_run']:.3g} times the largest run ({result['approach']})"
    ]
    text += _quantities(result["optimal"])
    if chosen := result.get("chosen"):
        price = chosen["flops_price"]
        text += [
            f"at N {chosen['params']:.4g}, D {chosen['tokens']:.4g} (D/N {chosen['tokens_per_param']:.3g}):",
            *(f"  {line}" for line in _quantities({"loss": chosen["loss"]})),
            f"  {chosen['excess_loss']['value']:+.4f} above the optimum: a compute-optimal run reaches it with "
            f"1/{price['value']:.3g} of the FLOPs",
        ]
    if run := result.get("next_run"):
        text.append(
            f"next run: N {run['params']:.3g}, D {run['tokens']:.3g} ({run['flops']:.3g} FLOPs) narrows the loss's "
            f"interval to {run['interval_width_factor']:.0%}"
        )
    return "\n".join([*text, *(f"warning: {warning}" for warning in result["warnings"])])
