"""Commands on checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bigtrain.cli.common import RUNS, Json, RunsDir, errors, show

app = typer.Typer(help="List, verify, export and convert checkpoints.", no_args_is_help=True)


@app.command("list")
def checkpoint_list(
    run: Annotated[str, typer.Argument(help="A run.")], runs_dir: RunsDir = RUNS, as_json: Json = False
) -> None:
    """List a run's checkpoints and whether they verify."""
    with errors(as_json):
        from bigtrain.checkpoint.survey import survey
        from bigtrain.run import find_run

        states = survey(find_run(run, runs_dir).checkpoints)
        rows = [{"step": state.step, "verified": state.verified, "bytes": state.bytes} for state in states]
        show({"checkpoints": rows}, as_json, lambda _: "\n".join(map(_checkpoint_line, rows)) or "No checkpoints yet")


def _checkpoint_line(row: dict[str, Any]) -> str:
    state = "verified" if row["verified"] else "DAMAGED"
    return f"step {row['step']:>8}  {row['bytes'] / 1e6:>10.1f} MB  {state}"


@app.command("verify")
def checkpoint_verify(
    run: Annotated[str, typer.Argument(help="A run, or RUN@STEP.")],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Compare every byte of a run's checkpoints with their manifests."""
    with errors(as_json):
        from bigtrain.checkpoint.survey import verify_all
        from bigtrain.run import find_run, split_run_step

        name, step = split_run_step(run)
        steps = verify_all(find_run(name, runs_dir).checkpoints, step)
        show(
            {"verified": steps},
            as_json,
            lambda _: f"{len(steps)} checkpoints are sound: steps {', '.join(map(str, steps))}",
        )


@app.command("export")
def checkpoint_export(
    run: Annotated[str, typer.Argument(help="A run, or RUN@STEP.")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's weights as safetensors, under qualified names."""
    with errors(as_json):
        from bigtrain.checkpoint.export import export

        directory, step = _checkpoint_of(run, runs_dir)
        files = export(directory, step, out)
        show(
            {"step": step, "files": [str(file) for file in files]},
            as_json,
            lambda value: "\n".join(value["files"]),
        )


@app.command("convert")
def checkpoint_convert(
    run: Annotated[str, typer.Argument(help="A run, or RUN@STEP.")],
    to: Annotated[Literal["deepspeed"], typer.Option("--to", help="Whose format.")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Write a checkpoint, optimizer included, as a universal checkpoint of DeepSpeed's."""
    with errors(as_json):
        from bigtrain.checkpoint.deepspeed_format import to_deepspeed

        directory, step = _checkpoint_of(run, runs_dir)
        place = to_deepspeed(directory, step, out)
        show(
            {"step": step, "format": to, "directory": str(place)},
            as_json,
            lambda value: f"{value['directory']}: load {out} with checkpoint: {{load_universal: true}}",
        )


@app.command("import")
def checkpoint_import(
    source: Annotated[Path, typer.Argument(help="A universal checkpoint of DeepSpeed's.")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    trust_checkpoint: Annotated[bool, typer.Option(help="You trust whoever wrote its pickles.")] = False,
    as_json: Json = False,
) -> None:
    """Make a checkpoint of DeepSpeed's one that `init.source: OUT` takes, optimizer included."""
    with errors(as_json):
        from bigtrain.checkpoint.deepspeed_format import from_deepspeed

        step = from_deepspeed(source, out, trusted=trust_checkpoint)
        show({"step": step, "directory": str(out)}, as_json, lambda _: f"init: {{source: {out}@{step}}}")


def _checkpoint_of(run: str, runs_dir: Path) -> tuple[Path, int]:
    """The directory of a run's checkpoints, and the step that is meant: the newest where none is given."""
    from bigtrain.checkpoint.commit import newest_verified
    from bigtrain.config import UserError
    from bigtrain.run import find_run, split_run_step

    name, step = split_run_step(run)
    directory = find_run(name, runs_dir).checkpoints
    if step is None:
        step, _ = newest_verified(directory)
    if step is None:
        raise UserError(f"The run '{name}' has no checkpoint yet", str(directory))
    return directory, step
