"""The process that talks to Weights & Biases: `python -m bigtrain.tracking.wandb_process`.

Standard input carries JSON lines: first how to start the run, then one object a logged step, or an alert; its end
means finish. Standard output answers with READY, or with why the run could not be started, then carries warnings,
one a line. It ignores the signals that stop a training run: the trainer's closing of the pipe, or its death,
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

from bigtrain.storage import write_atomic

READY = "ready"
"""The first line of the answer where the run has started; anything else says why it has not."""

LOG_FLUSH_INTERVAL_S = 2.0
"""How much of the run a kill may cost RUN/wandb."""

ORPHAN_LIMIT_S = 60.0
"""How long it may go on sending once the pipe has closed; a trainer that is alive kills it sooner."""


def main() -> int:
    """Serve one run; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # What wandb prints belongs to client.log; only our own lines may reach the pipe.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    start = json.loads(lines.readline() or "null")
    if start is None:
        return 0
    try:
        run = _start(start)
    except Exception as error:  # noqa: BLE001 - whatever W&B raises, the trainer is told in one line
        print(_brief(error), file=answers)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        # The usual way out would wait for a server that has just not answered.
        os._exit(1)
    print(READY, file=answers)
    try:
        run.finish(exit_code=_serve(run, lines))
    except Exception as error:  # noqa: BLE001 - one line for the user, the rest for the log
        print(f"W&B is off from here: {_brief(error)}", file=answers)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(run: Any, lines: BinaryIO) -> int:
    """Log until the pipe closes; returns the exit code of the run that W&B is to show."""
    first_free, code = int(run.step), 0
    for line in lines:
        if not line.endswith(b"\n"):
            break
        metrics = json.loads(line)
        if "alert" in metrics:
            run.alert(**metrics["alert"])
            code = int(metrics["failed"])
            continue
        step = metrics.pop("step")
        # After a resume from an older checkpoint W&B already holds these steps and refuses to go back.
        if step >= first_free:
            run.log({key: _media(value) for key, value in metrics.items() if value is not None}, step=step)
    limit = threading.Timer(ORPHAN_LIMIT_S, os._exit, [1])
    limit.daemon = True
    limit.start()
    return code


def _media(value: Any) -> Any:
    """W&B's own object for {"_wandb_table": columns, "rows": ...} and {"_wandb_html": path}; others as they are."""
    if isinstance(value, dict) and "_wandb_table" in value:
        import wandb

        return wandb.Table(columns=value["_wandb_table"], data=value["rows"])
    if isinstance(value, dict) and "_wandb_html" in value:
        import wandb

        return wandb.Html(Path(value["_wandb_html"]).read_text(encoding="utf-8"), inject=False)
    return value


def _start(start: dict[str, Any]) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        init_timeout=start["init_timeout_s"],
        login_timeout=start["init_timeout_s"],
        save_code=False,
        silent=True,
        x_stats_pid=start["trainer_pid"],
        x_transaction_log_flush_interval=LOG_FLUSH_INTERVAL_S,
    )
    run = wandb.init(
        dir=start["dir"], id=start["id"], name=start["name"], mode=start["mode"], project=start["project"],
        entity=start["entity"], tags=start["tags"], group=start["group"], config=start["config"], resume="allow",
        settings=settings,
    )  # fmt: skip
    if start["mode"] == "online" and run.url:
        write_atomic(Path(start["dir"]) / "wandb" / "url", run.url + "\n")
    return run


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
