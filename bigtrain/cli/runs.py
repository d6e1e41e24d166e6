"""Commands for runs on this machine: train, sample, evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import (
    RUNS,
    Json,
    Nproc,
    Overrides,
    PluginOption,
    RunName,
    RunsDir,
    bring_back_here,
    errors,
    load,
    load_plugins,
    show,
)
from bigtrain.run.names import RECORD

app = typer.Typer()

WEIGHTS = (
    "RUN, RUN@STEP or RUN@best, by name, path or URL; or a directory of Hugging Face weights or of `checkpoint import`."
)


def runs_dir_of(config: Path, runs_dir: Path | None) -> Path:
    """The directory of runs for a config: `runs_dir` if given, or else the one that holds the config's run, or RUNS."""
    if runs_dir is not None:
        return runs_dir
    return config.resolve().parent.parent if (config.parent / RECORD).exists() else RUNS


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    name: RunName = None,
    nproc: Nproc = None,
    fork: Annotated[str | None, typer.Option(help="Name of a new run that starts from the newest checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would run, and exit.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run the code of some ranks on fake tensors, and exit.")
    ] = False,
    plugin: PluginOption = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Directory of the runs.")] = None,
) -> None:
    """Train a run on this machine; a run that exists is resumed."""
    with errors():
        from bigtrain.jobs.train import train as start

        loaded, place = load(config, overrides, name, plugin), runs_dir_of(config, runs_dir)
        if not dry_run and not rehearse:
            bring_back_here(loaded, place)
        code = start(loaded, place, procs=nproc, fork=fork, dry_run=dry_run, rehearse=rehearse)
    raise typer.Exit(int(code))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help=WEIGHTS)],
    prompt: Annotated[str, typer.Option(help="What the text begins with; with --chat, a user's message.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines, all in one batch: {"prompt": ...} or {"messages": [...]}.')
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Format the prompt by the chat template of the model's tokenizer.")
    ] = False,
    image: Annotated[Path | None, typer.Option(help="Image file to describe, for a captioner.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Number of new tokens.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature; 0 always takes the most likely token.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens that together have this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample from tokens with at least this share of the highest probability.")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="Values above 1 make tokens that were written before less likely.")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Generate text that continues prompts, or a caption of an image, with the weights of a run."""
    with errors(as_json):
        load_plugins(plugin)
        from bigtrain.models.sampling import Choice  # imports torch, which takes seconds
        from bigtrain.training.sample import Prompt, caption, read_prompts, writer_at

        try:
            choice = Choice(temperature, top_k, top_p, min_p, repetition_penalty)
        except ValueError as error:
            from bigtrain.config import UserError

            raise UserError(str(error)) from None
        options: dict[str, Any] = {"tokens": tokens, "choice": choice, "seed": seed, "stop": stop or []}
        if image is not None:
            text = prompt + caption(run, runs_dir, prompt, image, **options)
            show({"text": text}, as_json, lambda result: result["text"])
            return
        writer = writer_at(run, runs_dir)
        first: Prompt = [{"role": "user", "content": prompt}] if chat else prompt
        given = [first] if prompts is None else read_prompts(prompts)
        found = [
            {"prompt": begun, "text": (begun if isinstance(begun, str) else "") + text}
            for begun, text in zip(given, writer.write(given, **options), strict=True)
        ]
        if prompts is None:
            show({"text": found[0]["text"]}, as_json, lambda result: result["text"])
            return
        show({"texts": found}, as_json, lambda result: "\n\n".join(one["text"] for one in result["texts"]))


@app.command()
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(help=f"{WEIGHTS} And key=value pairs, such as layout.tp=2."),
    ],
    data: Annotated[list[str], typer.Option(help="Shards, or NAME=SHARDS; may be repeated.")],
    nproc: Annotated[int, typer.Option(min=1, help="Number of processes on this machine.")] = 1,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            help="JSON lines of requests (context, continuations, gold, task), or OLMo's requests.jsonl.gz; repeatable."
        ),
    ] = None,
    batches: Annotated[int | None, typer.Option(min=1, help="Largest number of global batches of each set.")] = None,
    sequences: Annotated[int | None, typer.Option(min=1, help="Largest number of sequences of each set.")] = None,
    plugin: PluginOption = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and bits per byte of checkpoints on held-out shards, with any layout that fits."""
    with errors(as_json):
        from bigtrain.jobs.evaluate import evaluate as measure

        load_plugins(plugin)
        overrides = [one for one in what if "=" in one]
        checkpoints = [one for one in what if "=" not in one]
        if not checkpoints:
            from bigtrain.config import UserError

            raise UserError("No checkpoint is named", fix="Name a run, RUN@STEP or a directory of weights.")
        rows = measure(
            checkpoints,
            data,
            overrides=overrides,
            runs_dir=runs_dir,
            procs=nproc,
            batches=batches,
            sequences=sequences,
            tasks=tasks or [],
        )
        show({"checkpoints": rows}, as_json, lambda result: _table(result["checkpoints"]))


def _table(rows: list[dict[str, Any]]) -> str:
    """A table with one line for each checkpoint and data set."""
    lines = [f"{'checkpoint':<32} {'set':<16} {'loss':>10} {'perplexity':>12} {'bits/byte':>10}"]
    for row in rows:
        name = (
            row["checkpoint"]
            if row["step"] is None or "@" in row["checkpoint"]
            else f"{row['checkpoint']}@{row['step']}"
        )
        for of, found in row["sets"].items():
            if of == "all" and sum("loss" in one for one in row["sets"].values()) == 2:
                continue  # With one data set, "all" is the same.
            if "loss" not in found:
                lines.append(f"{name:<32} {of:<16} " + "  ".join(f"{key} {value:.4g}" for key, value in found.items()))
                continue
            numbers = [found["loss"], found.get("perplexity"), found.get("bits_per_byte")]
            loss, perplexity, bits = ("-" if number is None else f"{number:.5g}" for number in numbers)
            lines.append(f"{name:<32} {of:<16} {loss:>10} {perplexity:>12} {bits:>10}")
    return "\n".join(lines)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run.")],
    beside: Annotated[str | None, typer.Argument(help="Second run, which is shown beside the first.")] = None,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write the report of a run, or the comparison of two runs, as one HTML file that opens offline."""
    with errors():
        from bigtrain.run import Lease, find_run
        from bigtrain.tracking.report import write_comparison, write_report

        directory = find_run(run, runs_dir)
        if beside is not None:
            other = find_run(beside, runs_dir)
            target = directory.path / f"report-{directory.path.name}-{other.path.name}.html"
            print(write_comparison(directory.path, other.path, target))
            return
        holder = Lease.holder(directory)
        print(write_report(directory.path, alive=holder is not None and holder.alive()))
