"""The commands `bigtrain checkpoint`: list, verify, prune, export and convert checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bigtrain.cli.common import RUNS, Json, PluginOption, RunsDir, errors, lines, load_plugins, show

if TYPE_CHECKING:
    from bigtrain.checkpoint.peft import PeftFiles
    from bigtrain.run import RunDirectory

RunArgument = Annotated[
    str,
    typer.Argument(
        help="A run, RUN@STEP or RUN@best: by name, by path, or by URL on a store (s3://BUCKET/PREFIX/NAME); or a "
        "directory of `checkpoint import`."
    ),
]

app = typer.Typer(help="List, inspect, verify, prune, export and convert checkpoints.", no_args_is_help=True)


@app.command("list")
def checkpoint_list(
    run: RunArgument, plugin: PluginOption = None, runs_dir: RunsDir = RUNS, as_json: Json = False
) -> None:
    """List a run's checkpoints, and verify them; of checkpoints on a store, only the sizes are compared."""
    with errors(as_json):
        from bigtrain.checkpoint.survey import survey, survey_store
        from bigtrain.config.urls import is_url
        from bigtrain.run import find_checkpoints

        load_plugins(plugin)
        states = survey_store(run, hashes=False) if is_url(run) else survey(find_checkpoints(run, runs_dir).checkpoints)
        rows = [
            {"step": state.step, "verified": state.verified, "bytes": state.bytes, "best": state.best}
            for state in states
        ]
        show({"checkpoints": rows}, as_json, lambda _: "\n".join(map(_checkpoint_line, rows)) or "No checkpoints yet")


def _checkpoint_line(row: dict[str, Any]) -> str:
    state = {True: "verified", False: "DAMAGED", None: "not read"}[row["verified"]]
    return f"step {row['step']:>8}  {row['bytes'] / 1e6:>10.1f} MB  {state}{'  best' if row['best'] else ''}"


@app.command("verify")
def checkpoint_verify(
    run: RunArgument,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Compare every byte of a run's checkpoints with their manifests, and check that they belong to the run."""
    with errors(as_json):
        from bigtrain.checkpoint.commit import step_name
        from bigtrain.checkpoint.manifest import read_manifest
        from bigtrain.checkpoint.restore import resolve_best
        from bigtrain.checkpoint.survey import survey, survey_store, verify_all
        from bigtrain.config.urls import is_url
        from bigtrain.run import find_checkpoints, split_run_step

        load_plugins(plugin)
        name, step = split_run_step(resolve_best(run, runs_dir))
        if is_url(name):
            steps = verify_all(survey_store(name, step), name)
        else:
            found = find_checkpoints(name, runs_dir)
            steps = verify_all(survey(found.checkpoints, step), str(found.checkpoints))
            for one in steps if found.exists() else ():
                found.check_checkpoint(one, read_manifest(found.checkpoints / step_name(one)).identity)
        show(
            {"verified": steps},
            as_json,
            lambda _: f"{len(steps)} checkpoints are intact: steps {', '.join(map(str, steps))}",
        )


@app.command("inspect")
def checkpoint_inspect(
    run: RunArgument,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show the content of a checkpoint: tensors, mesh, data position, files and their hashes."""
    with errors(as_json):
        from bigtrain.checkpoint.survey import inspect

        load_plugins(plugin)
        found, step = _checkpoint_of(run, runs_dir)
        show(inspect(found.checkpoints, step), as_json, _inspected)


def _inspected(found: dict[str, Any]) -> str:
    rows = [(tensor["name"], " x ".join(map(str, tensor["shape"])) or "-", tensor) for tensor in found.pop("tensors")]
    width, shapes = (max(len(row[column]) for row in rows) for column in (0, 1))
    tensors = [
        f"{name:{width}}  {shape:>{shapes}}  {tensor['dtype']}  pieces: {tensor['pieces']}"
        for name, shape, tensor in rows
    ]
    return "\n".join([lines(found), "", *tensors])


@app.command("prune")
def checkpoint_prune(
    run: Annotated[str, typer.Argument(help="A run that is not running, or its URL on a store.")],
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Number of verified checkpoints to keep; default: from the run's config.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be deleted, and delete nothing.")
    ] = False,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Remove checkpoints, but keep the permanent ones, the best ones and the last verified ones."""
    with errors(as_json):
        from bigtrain.config.urls import is_url

        load_plugins(plugin)
        steps = _pruned_store(run, keep_last, dry_run) if is_url(run) else _pruned(run, runs_dir, keep_last, dry_run)
        said = "would be removed" if dry_run else "removed"
        show({"steps": steps, "dry_run": dry_run}, as_json, lambda _: f"{said}: {', '.join(map(str, steps)) or 'none'}")


def _pruned(run: str, runs_dir: Path, keep_last: int | None, dry_run: bool) -> list[int]:
    from bigtrain.checkpoint import commit
    from bigtrain.checkpoint.best import best_checkpoints
    from bigtrain.run import Lease, find_run, load_config

    found = find_run(run, runs_dir)
    if keep_last is None:
        keep_last = load_config(found.config).checkpoint.keep_last
    known_good: set[tuple[str, int]] = set()
    spare = {best.step for best in best_checkpoints(found.checkpoints, known_good)}
    if dry_run:
        return commit.prune(found.checkpoints, keep_last, known_good, spare=spare, dry_run=True)
    lease = Lease.acquire(found, commit.published_lease(found.checkpoints))
    try:
        return commit.prune(found.checkpoints, keep_last, known_good, spare=spare)
    finally:
        lease.release()


def _pruned_store(url: str, keep_last: int | None, dry_run: bool) -> list[int]:
    from bigtrain.checkpoint.store import RunStore
    from bigtrain.config import UserError

    if keep_last is None:
        raise UserError("Pruning a store needs the number of checkpoints to keep", url, "Add --keep-last 3.")
    return RunStore(url).prune(keep_last, dry_run=dry_run)


@app.command("export")
def checkpoint_export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="Output directory, which must not exist.")],
    form: Annotated[
        Literal["bigtrain", "hf", "peft"],
        typer.Option(
            "--format", help="Qualified names; what transformers reads, with adapters merged; or adapters for peft."
        ),
    ] = "bigtrain",
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's weights as safetensors."""
    with errors(as_json):
        load_plugins(plugin)
        found, step = _checkpoint_of(run, runs_dir)
        if form == "hf":
            from bigtrain.training.export import export_run

            files = export_run(found, step, out)
        elif form == "peft":
            from bigtrain.training.export import export_adapters

            files = export_adapters(found, step, out)
        else:
            from bigtrain.checkpoint.export import export

            files = export(found.checkpoints, step, out)
        show(
            {"step": step, "files": [str(file) for file in files]},
            as_json,
            lambda value: "\n".join(value["files"]),
        )


@app.command("convert")
def checkpoint_convert(
    run: RunArgument,
    to: Annotated[Literal["deepspeed"], typer.Option("--to", help="Format to write.")],
    out: Annotated[Path, typer.Option(help="Output directory, which must not exist.")],
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Write a checkpoint, including the optimizer state, as a universal checkpoint of DeepSpeed."""
    with errors(as_json):
        from bigtrain.checkpoint.deepspeed_format import to_deepspeed

        load_plugins(plugin)
        found, step = _checkpoint_of(run, runs_dir)
        place = to_deepspeed(found.checkpoints, step, out)
        show(
            {"step": step, "format": to, "directory": str(place)},
            as_json,
            lambda value: f"{value['directory']}: load {out} with checkpoint: {{load_universal: true}}",
        )


@app.command("import")
def checkpoint_import(
    source: Annotated[
        Path, typer.Argument(help="Hugging Face weights, peft's adapters, or a universal checkpoint of DeepSpeed's.")
    ],
    out: Annotated[Path, typer.Option(help="Output directory, which must not exist.")],
    base: Annotated[
        Path | None, typer.Option(help="Base weights of peft's adapters; default: those that the adapters name.")
    ] = None,
    trust_checkpoint: Annotated[
        bool, typer.Option(help="Load the pickles of a DeepSpeed checkpoint, which can run code of their author.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert foreign weights into a checkpoint that `init.source: OUT`, evaluate, sample and export accept."""
    with errors(as_json):
        from bigtrain.checkpoint.peft import PeftFiles
        from bigtrain.models.hf_files import HfFiles

        if PeftFiles.is_one(source):
            step, model = _with_adapters(PeftFiles.open(source), base, out)
        elif HfFiles.is_one(source):
            from bigtrain.checkpoint.huggingface import import_hf

            step, model = import_hf(source, out)
        else:
            from bigtrain.checkpoint.deepspeed_format import from_deepspeed

            step, model = from_deepspeed(source, out, trusted=trust_checkpoint), None
        result = {"step": step, "directory": str(out), **({} if model is None else {"model": model})}
        show(result, as_json, lambda _: "\n".join(_how_to_begin(out, step, model)))


def _with_adapters(adapters: PeftFiles, base: Path | None, out: Path) -> tuple[int, dict[str, Any]]:
    from bigtrain.checkpoint.huggingface import import_hf
    from bigtrain.config import UserError

    weights = base or adapters.base
    if weights is None:
        raise UserError(
            "The adapters do not name an existing directory of base weights", str(adapters.directory), "Add --base DIR."
        )
    return import_hf(weights, out, adapters)


def _how_to_begin(out: Path, step: int, model: dict[str, Any] | None) -> list[str]:
    """The lines of a run's YAML with which a run starts from the imported checkpoint."""
    lines = [] if model is None else [f"model: {json.dumps(model)}"]
    return [*lines, f"init: {{source: {out}@{step}}}"]


def _checkpoint_of(run: str, runs_dir: Path) -> tuple[RunDirectory, int]:
    """A run, downloaded if named by a URL, and the step: the newest intact one if none is given."""
    from bigtrain.checkpoint.restore import checkpoint_at, newest_of

    found, step = checkpoint_at(run, runs_dir)
    return found, newest_of(found) if step is None else step
