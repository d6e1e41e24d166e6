"""The commands: parse, call, print; nothing else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import bigtrain

app = typer.Typer(
    name="bigtrain",
    help="Train transformer models with one YAML file, from a laptop's CPU to a cluster of GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Pack text into shards, index tars, look into both.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="List, verify and export checkpoints.", no_args_is_help=True)
config_app = typer.Typer(help="Show, validate and describe configs.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure this machine and this build.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")

RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Where runs live.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; all else goes to stderr.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value pairs laid over the file.")]
RUNS = Path("runs")


@contextmanager
def errors(as_json: bool = False) -> Iterator[None]:
    """Show a user's mistake without a traceback, and exit with its code."""
    from bigtrain.config import UserError

    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.filename is None:
                raise
            error = UserError(error.strerror or "The file cannot be used", str(error.filename))
        if as_json:
            print(json.dumps(error.as_json()))
        else:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


def show(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """Print a result for a program or for a person."""
    print(json.dumps(result) if as_json else text(result))


def lines(result: dict[str, Any], indent: str = "") -> str:
    """A JSON object as lines of "key  value", for people."""
    width = max((len(key) for key in result), default=0)
    text = []
    for key, value in result.items():
        if isinstance(value, dict):
            text += [f"{indent}{key}", lines(value, indent + "  ")]
        elif isinstance(value, list) and not value:
            text.append(f"{indent}{key:{width}}  none")
        elif isinstance(value, list):
            text += [f"{indent}{key}", *(f"{indent}  {item}" for item in value)]
        elif value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
            text.append(f"{indent}{key:{width}}  {shown}")
    return "\n".join(text)


def _version(value: bool) -> None:
    if value:
        print(f"bigtrain {bigtrain.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


def load(config: Path, overrides: list[str] | None, name: str | None = None) -> Any:
    """A run's config; see `bigtrain.run.load_config`."""
    from bigtrain.run import load_config

    return load_config(config, overrides, name)


def runs_dir_of(config: Path, runs_dir: Path | None) -> Path:
    """Where the run of a config lives: beside its siblings, where the config is that of an existing run."""
    if runs_dir is not None:
        return runs_dir
    return config.resolve().parent.parent if (config.parent / "run.json").exists() else RUNS


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run, instead of the file's.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes on this machine.")] = None,
    fork: Annotated[str | None, typer.Option(help="Start a new run from the newest checkpoint.")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Where runs live.")] = None,
) -> None:
    """Train a run on this machine; a run that exists resumes where it is."""
    with errors():
        from bigtrain.jobs.train import train as start

        code = start(load(config, overrides, name), runs_dir_of(config, runs_dir), procs=nproc, fork=fork)
    raise typer.Exit(int(code))


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="A run; all of them where left out.")] = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Show where runs stand."""
    with errors(as_json):
        from bigtrain.run import Lease, find_run, list_runs
        from bigtrain.tracking.status import status as read_status

        found = [find_run(name, runs_dir)] if name else list_runs(runs_dir)
        rows = []
        for run in found:
            holder = Lease.holder(run)
            rows.append(read_status(run.path, alive=holder is not None and holder.alive()))
        result = rows[0] if name else {"runs": rows}
        show(
            result,
            as_json,
            lambda _: "\n".join(_status_line(row) for row in rows) or f"No runs in {runs_dir}",
        )


def _status_line(row: dict[str, Any]) -> str:
    parts = [f"{row['name']}: {row['state']}"]
    for key, form in (
        ("step", "step {}"),
        ("loss", "loss {:.4f}"),
        ("tokens_per_s", "{:.0f} tokens/s"),
        ("goodput", "goodput {:.0%}"),
        ("restarts", "{} restarts"),
        ("eta_s", "{:.0f} s left"),
    ):
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    return "  ".join(parts)


@app.command()
def stop(
    name: Annotated[str, typer.Argument(help="A run on this machine.")],
    now: Annotated[bool, typer.Option("--now", help="At once, without a save.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Let a run save itself and end; it can be resumed."""
    with errors():
        from bigtrain.jobs.stop import stop as end
        from bigtrain.run import find_run

        print(end(find_run(name, runs_dir), now))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="A run, or RUN@STEP.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest only.")] = None,
    seed: Annotated[int, typer.Option(help="Another text for another number.")] = 0,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the weights of a run."""
    with errors(as_json):
        from bigtrain.run import find_run, split_run_step

        name, step = split_run_step(run)
        directory = find_run(name, runs_dir)
        from bigtrain.training.sample import sample as draw  # torch, which takes seconds

        text = draw(
            directory,
            prompt,
            step=step,
            tokens=tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        show({"text": text}, as_json, lambda result: result["text"])


@app.command()
def report(run: Annotated[str, typer.Argument(help="A run.")], runs_dir: RunsDir = RUNS) -> None:
    """Write a run's report: one HTML file that opens offline."""
    with errors():
        from bigtrain.run import Lease, find_run
        from bigtrain.tracking.report import write_report

        directory = find_run(run, runs_dir)
        holder = Lease.holder(directory)
        print(write_report(directory.path, alive=holder is not None and holder.alive()))


@data_app.command("pack")
def data_pack(
    inputs: Annotated[list[str], typer.Argument(help="Text files, directories, or .jsonl files.")],
    out: Annotated[Path, typer.Option(help="A new directory; gets train/ and validation/.")],
    tokenizer: Annotated[str, typer.Option(help="bytes, a tokenizer.json, or a directory with GPT-2's files.")],
    validation: Annotated[str, typer.Option(help="Share of the documents to hold out, such as 1%.")] = "0%",
    key: Annotated[str, typer.Option(help="The key of a JSON line that holds the text.")] = "text",
    shard_size: Annotated[str, typer.Option(help="Size of a shard.")] = "64 MiB",
    as_json: Json = False,
) -> None:
    """Tokenise documents into WebDataset shards."""
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.config.units import parse_bytes
        from bigtrain.data.pack import pack
        from bigtrain.data.tokenizers import Tokenizer

        try:
            shard_bytes = parse_bytes(shard_size)
        except ValueError as error:
            raise UserError(str(error), "--shard-size") from None
        summary = pack(
            inputs,
            out,
            Tokenizer.open(tokenizer),
            validation=validation,
            key=key,
            shard_bytes=shard_bytes,
        )
        show(summary.as_json(), as_json, lines)


@data_app.command("tokenizer")
def data_tokenizer(
    inputs: Annotated[list[str], typer.Argument(help="Text files, directories, or .jsonl files.")],
    vocab: Annotated[int, typer.Option(help="Entries of the vocabulary.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    as_json: Json = False,
) -> None:
    """Learn a byte-level BPE tokenizer from text."""
    with errors(as_json):
        from bigtrain.data.documents import documents
        from bigtrain.data.tokenizers import train_bpe

        learned = train_bpe(documents(inputs), vocab, out)
        result = {"out": str(out), "vocab_size": learned.vocab_size}
        show(result, as_json, lambda value: f"{value['out']}: {value['vocab_size']} tokens")


@data_app.command("index")
def data_index(
    path: Annotated[Path, typer.Argument(help="A directory of tars made elsewhere.")], as_json: Json = False
) -> None:
    """Index tars made elsewhere, so that runs can read them."""
    with errors(as_json):
        from bigtrain.data.indexing import index_directory

        index = index_directory(path)
        result = {
            "path": str(path),
            "kind": index.kind,
            "shards": len(index.shards),
            "samples": index.samples,
            "tokens": index.tokens,
            "fingerprint": index.fingerprint,
        }
        show(
            result,
            as_json,
            lambda value: f"{value['path']}: {value['samples']} {value['kind']} in {value['shards']} shards",
        )


@data_app.command("inspect")
def data_inspect(
    path: Annotated[Path, typer.Argument(help="A shard directory.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, to count them.")] = 1024,
    as_json: Json = False,
) -> None:
    """Show what a shard directory holds."""
    with errors(as_json):
        from bigtrain.data.inspect import inspect

        found = inspect(path, context)
        show(found.as_json(), as_json, lines)


@data_app.command("verify")
def data_verify(path: Annotated[Path, typer.Argument(help="A shard directory.")], as_json: Json = False) -> None:
    """Compare every byte of a shard directory with its index."""
    with errors(as_json):
        from bigtrain.data.inspect import verify

        found = verify(path)
        found.raise_for_problems()
        show(found.as_json(), as_json, lines)


@checkpoint_app.command("list")
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


@checkpoint_app.command("verify")
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


@checkpoint_app.command("export")
def checkpoint_export(
    run: Annotated[str, typer.Argument(help="A run, or RUN@STEP.")],
    out: Annotated[Path, typer.Option(help="A new directory.")],
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Write a checkpoint's weights as safetensors, under qualified names."""
    with errors(as_json):
        from bigtrain.checkpoint.commit import newest_verified
        from bigtrain.checkpoint.export import export
        from bigtrain.config import UserError
        from bigtrain.run import find_run, split_run_step

        name, step = split_run_step(run)
        directory = find_run(name, runs_dir).checkpoints
        if step is None:
            step, _ = newest_verified(directory)
        if step is None:
            raise UserError(f"The run '{name}' has no checkpoint yet", str(directory))
        files = export(directory, step, out)
        show(
            {"step": step, "files": [str(file) for file in files]},
            as_json,
            lambda value: "\n".join(value["files"]),
        )


@config_app.command("show")
def config_show(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print the resolved config: every default, absolute paths."""
    with errors(as_json):
        from bigtrain.config.yaml_file import dump

        show(load(config, overrides).plain(), as_json, lambda value: dump(value).rstrip())


@config_app.command("validate")
def config_validate(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Check a config against its data, without training."""
    with errors(as_json):
        from bigtrain.models.check import check_model
        from bigtrain.training.prepare import prepare

        prepared = prepare(load(config, overrides))
        check_model(prepared.config.model, prepared.outputs)
        result = {
            "name": prepared.config.name,
            "identity": prepared.identity,
            "total_steps": prepared.total_steps,
            "parameters": prepared.config.model.parameter_count(prepared.outputs),
        }
        show(
            result,
            as_json,
            lambda value: (
                f"{config} is valid: {value['parameters'] / 1e6:.2f}M parameters, {value['total_steps']} steps"
            ),
        )


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a run's YAML, for editors."""
    with errors():
        from bigtrain.run import config_schema as schema

        print(json.dumps(schema(), indent=2))


@bench_app.command(
    "train", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench_train(context: typer.Context) -> None:
    """Compare a training step with a plain PyTorch loop's, paired in one run; --help shows its options."""
    os.execv(sys.executable, [sys.executable, "-m", "bigtrain.testing.bench_train", *context.args])


def main() -> None:
    """The `bigtrain` command."""
    try:
        app()
    except KeyboardInterrupt:
        print("stopped before anything was started", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
