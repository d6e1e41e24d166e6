"""Training under another launcher: torchrun, or any launcher that sets torchrun's environment variables.

    torchrun --nproc-per-node 8 -m bigtrain.jobs.torchrun CONFIG [key=value ...] [--name NAME] [--runs-dir DIR]
                                                          [--plugin MODULE]

Rank 0 checks the config and holds the run's lease; the other ranks wait for its result. Run directory, identity and
checkpoints are the same as with `bigtrain train`, so either command resumes a run of the other. The launcher handles
restarts, logs and hung ranks (torchrun --max-restarts, --log-dir). There is no agent, so `job.limits` has no effect,
and no notification is sent if all ranks are killed at the same time. On SIGTERM to torchrun the run saves and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bigtrain import variables
from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin, plugin_environment
from bigtrain.heartbeat import Heartbeat, StopRequest, install_rank_signals
from bigtrain.run import ExitCode, RunConfig, RunDirectory, load_config

if TYPE_CHECKING:
    from torch.distributed import Store

START_TIMEOUT: Final = timedelta(minutes=10)
"""How long the other ranks wait for the checks of rank 0."""

_WORD: Final = "bigtrain/word"
_NEEDED: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank to its end; returns a value of ExitCode."""
    stop = install_rank_signals()
    try:
        return _rank(_parse(arguments), stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bigtrain.jobs.torchrun")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value pairs that override the file")
    parser.add_argument("--name")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--plugin", action="append")
    return parser.parse_intermixed_args(arguments)


def _rank(options: argparse.Namespace, stop: StopRequest) -> int:
    missing = [name for name in _NEEDED if name not in os.environ]
    if missing:
        raise UserError(
            f"The environment lacks {', '.join(missing)}, which the process of a rank needs",
            fix="Start it with torchrun, or use `bigtrain train`, which starts its ranks itself.",
        )
    if options.plugin:
        load_plugin(os.pathsep.join(options.plugin))
    os.environ.update(plugin_environment())
    config = load_config(options.config, options.overrides, options.name)
    from torch.distributed.rendezvous import rendezvous  # imports torch, which takes seconds

    # Under torchrun this is torchrun's own store, with another key prefix after each restart.
    store = next(iter(rendezvous("env://", timeout=START_TIMEOUT)))[0]
    directory = RunDirectory((options.runs_dir / config.name).absolute())
    if int(os.environ["RANK"]) == 0:
        return _lead(config, directory, store, stop)
    word = json.loads(store.get(_WORD))
    return int(word["code"]) if "code" in word else _train(directory, word["lease"], stop)


def _lead(config: RunConfig, directory: RunDirectory, store: Store, stop: StopRequest) -> int:
    """Run rank 0: check the run, hold its lease, train, and record how the run ends."""
    from bigtrain.jobs.announce import say_start
    from bigtrain.jobs.check import check
    from bigtrain.jobs.ending import tell_end
    from bigtrain.tracking.metrics import last_step

    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    with contextlib.ExitStack() as stack:
        try:
            try:
                config.layout.mesh(world)
            except ValueError as error:
                raise UserError(str(error), fix="Change the number of processes or the layout.") from None
            run = check(config, directory.path.parent).with_job(nodes=world // local, procs_per_node=local)
            if run.finished:
                print(f"The run '{config.name}' is finished: {run.newest} steps. Nothing to do.", file=sys.stderr)
                store.set(_WORD, json.dumps({"code": ExitCode.FINISHED}))
                return ExitCode.FINISHED
            lease = stack.enter_context(run.held())
        except UserError as error:
            store.set(_WORD, json.dumps({"code": error.exit_code}))
            raise
        say_start(run, world, sys.stderr)
        store.set(_WORD, json.dumps({"lease": lease.number}))
        attempt = lease.number - 1
        try:
            code = _train(directory, lease.number, stop)
        except BaseException as error:
            cause = f"rank 0 raised {type(error).__name__}: {error}"
            directory.event("fault", attempt=attempt, step=last_step(directory.metrics), cause=cause, rank=0)
            raise
        name = "finished" if code == ExitCode.FINISHED else "stopped"
        directory.event(name, attempt=attempt, step=last_step(directory.metrics))
    tell_end(directory, run.prepared.config, code, sys.stderr)
    return code


def _train(directory: RunDirectory, lease: int, stop: StopRequest) -> int:
    os.environ[variables.LEASE] = str(lease)
    os.environ[variables.ATTEMPT] = str(lease - 1)
    from bigtrain.training.session import train_rank

    return train_rank(directory, Heartbeat.from_environment(), stop)


if __name__ == "__main__":
    sys.exit(main())
