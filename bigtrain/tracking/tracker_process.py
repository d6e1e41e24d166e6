"""The process of a tracker: `python -m bigtrain.tracking.tracker_process NAME`.

Standard input carries JSON lines: first which tracker to open and how, then one object a logged step, or an alert; its
end means finish. Standard output answers with READY, or with why the tracker could not be started, then carries
warnings, one a line. It ignores the signals that stop a training run: the trainer's closing of the pipe, or its death,
is what ends it.
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
"""The first line of the answer where the tracker has started; anything else says why it has not."""

OUTLIVE_TRAINER_S = 60.0
"""How long it may go on sending once the pipe has closed; a trainer that is alive kills it sooner."""


def main() -> int:
    """Serve one tracker; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # What a library prints belongs to client.log; only our own lines may reach the pipe.
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
        # The usual way out would wait for a server that has just not answered.
        os._exit(1)
    print(READY, file=answers)
    try:
        tracker.close(_serve(tracker, lines))
    except Exception as error:  # noqa: BLE001 - one line for the user, the rest for the log
        print(f"{tracker_label(first)} is off from here: {_brief(error)}", file=answers)
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
    """What messages call the tracker."""
    from bigtrain.tracking.config import TRACKERS

    return TRACKERS[first["tracker"]["name"]].label


def _serve(tracker: Any, lines: BinaryIO) -> bool:
    """Log until the pipe closes; whether the run has failed."""
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
