"""The process of a tracker: `python -m bigtrain.tracking.tracker_process NAME`.

The process reads JSON lines from standard input: first the tracker to open and its arguments, then one object for each
logged step, or an alert. At the end of the input it closes the tracker. It writes to standard output first READY, or
the reason why the tracker could not start; then warnings, one on each line.

The process ignores the signals that stop a training run. It ends when the trainer closes the pipe or dies.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

READY = "ready"
"""The first line of the output if the tracker has started; any other first line is the reason why it has not."""

OUTLIVE_TRAINER_S = 60.0
"""Seconds that the process may still send data after the pipe has closed; a trainer that is alive kills it sooner."""


def main() -> int:
    """Serve one tracker; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The output of libraries goes to client.log; only the lines of this module may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    first = json.loads(lines.readline() or "null")
    if first is None:
        return 0
    try:
        tracker = _open(first)
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the trainer gets one line
        print(_brief(error), file=answers)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        # A normal exit would wait for the server, which has just failed to answer.
        os._exit(1)
    print(READY, file=answers)
    try:
        tracker.close(_serve(tracker, lines))
    except Exception as error:  # noqa: BLE001 - one line for the user, the rest for the log
        print(f"{tracker_label(first)} is disabled from now on: {_brief(error)}", file=answers)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _open(first: dict[str, Any]) -> Any:
    from bigtrain.config.plugin import plugin_of_launcher
    from bigtrain.tracking.config import TRACKERS, TrackedRun

    os.environ.update(first["plugins"])
    keys = first["tracker"]
    if keys["name"] not in TRACKERS.builtin():
        plugin_of_launcher()
    config = TRACKERS[keys["name"]].model_validate(keys)
    return config.open(TrackedRun(Path(first["directory"]), first["name"], first["config"]), first["start"])


def tracker_label(first: dict[str, Any]) -> str:
    """Name of the tracker in messages."""
    from bigtrain.tracking.config import TRACKERS

    return TRACKERS[first["tracker"]["name"]].label


def _serve(tracker: Any, lines: BinaryIO) -> bool:
    """Pass the lines to the tracker until the pipe closes; returns whether an alert said that the run has failed."""
    failed = False
    for line in lines:
        if not line.endswith(b"\n"):
            break
        row = json.loads(line)
        if "alert" in row:
            tracker.alert(**row["alert"])
            failed = bool(row["failed"])
        else:
            tracker.log(row)
    limit = threading.Timer(OUTLIVE_TRAINER_S, os._exit, [1])
    limit.daemon = True
    limit.start()
    return failed


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
