"""Options, error handling and output that the commands share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Directory of the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; other output goes to stderr.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value pairs that override the file.")]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", metavar="MODULE", help="Your own code (a .py file, a package or a module); may be repeated."
    ),
]
RunName = Annotated[str | None, typer.Option("--name", help="Name of the run; default: the file's.")]
NewName = Annotated[str | None, typer.Option("--name", help="Name of the sweep; default: the file's.")]
Nproc = Annotated[int | None, typer.Option("--nproc", help="Number of processes on this machine.")]
Now = Annotated[bool, typer.Option("--now", help="End the ranks at once, without a save.")]
RUNS = Path("runs")


@contextmanager
def errors(as_json: bool = False) -> Iterator[None]:
    """Print a user error without a traceback, and exit with its exit code."""
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
            error = UserError(error.strerror or "The file cannot be read or written", str(error.filename))
        if as_json:
            print(json.dumps(error.as_json()))
        else:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def counting(what: str) -> Iterator[Callable[[str], None]]:
    """A context with a function that counts finished items; if stderr is a terminal, the count is shown there.

    Args:
        what: What is done or counted, for the shown line.

    Yields:
        A function to call with the name of each finished item.
    """
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{what}: {done} ({name})\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield count
    finally:
        if done and sys.stderr.isatty():
            print(file=sys.stderr)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A context with a function that shows the progress of stages, if stderr is a terminal.

    Yields:
        A function to call with the name of a stage, the number of finished items and the number of all items.
    """
    shown = False

    def say(stage: str, done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            shown = True
            print(f"\r{stage}: {done} of {total} ({done / total:.0%})\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield say
    finally:
        if shown:
            print(file=sys.stderr)


def show(result: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], str]) -> None:
    """Print a result as JSON, or as the text that `text` makes of it."""
    print(json.dumps(result) if as_json else text(result))


def lines(result: dict[str, Any], indent: str = "") -> str:
    """Format a JSON object as lines of "key  value", for users."""
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


def load(config: Path, overrides: list[str] | None, name: str | None = None, plugin: list[str] | None = None) -> Any:
    """Load plugins and a run's config; see `bigtrain.run.load_config`."""
    from bigtrain.run import load_config

    load_plugins(plugin)
    return load_config(config, overrides, name)


def bring_back_here(config: Any, runs_dir: Path) -> None:
    """Restore a run that has no checkpoint on this machine, but has checkpoints on its store."""
    if config.checkpoint.storage is not None:
        from bigtrain.checkpoint.restore import bring_back

        done = bring_back(config, runs_dir)
        if done is not None:
            print(done, file=sys.stderr)


def load_plugins(places: list[str] | None) -> Any:
    """Load the user code that `--plugin` names; see `bigtrain.config.plugin.load_plugin`."""
    from bigtrain.config.plugin import load_plugin

    return load_plugin(os.pathsep.join(places)) if places else None
