"""The message that is sent when a run has ended: by a command, a webhook or an alert of W&B.

    python -m bigtrain.jobs.notify      sends the message in a separate process; it reads one JSON object

The command gets this object on standard input, the webhook as the body of a POST (application/json):

    {"format_version": 1,
     "text": "tiny failed after step 1200: rank 3 on host a7 was killed by SIGKILL at step 1234",   the message to show
     "run": "tiny", "state": "finished" | "stopped" | "failed", "exit_code": 0 | 75 | 1 | 2,
     "step": 1200, "loss": 2.31, "goodput": 0.93, "restarts": 2,            null if not known
     "cause": "rank 3 on host a7 ...",                                      null unless the run failed
     "host": "login-1", "directory": "/home/me/runs/tiny", "wandb_url": null, "time": 1790000000.0}

Chat services that accept {"text": ...} (Slack, Mattermost) show the text. A failure to send the message is written to
logs/notify.log; it does not change the run's state or exit code.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from bigtrain.children import module_command, with_source
from bigtrain.tracking.history import newest, read_events
from bigtrain.tracking.redact import redact, redact_text

if TYPE_CHECKING:
    from bigtrain.run import RunConfig, RunDirectory

FORMAT_VERSION: Final = 1
WAIT_S: Final = 5.0
"""How long the launcher waits for the notification; after that the notification continues without the launcher."""
LIMIT_S: Final = 30.0
"""How long the command, the webhook and the alert may each take, in seconds."""
TRIES: Final = 3
MAX_OUTPUT: Final = 4000

_STATES: Final = {0: "finished", 75: "stopped"}


def message(directory: RunDirectory, status: Mapping[str, Any], code: int) -> dict[str, Any]:
    """The message about a run's end, without secrets; see the module's docstring.

    Args:
        directory: The run directory.
        status: The object that `bigtrain status --json` prints.
        code: How the run ended, as a value of ExitCode.
    """
    state = _STATES.get(code, "failed")
    cause = newest(read_events(directory.events), "cause") if state == "failed" else None
    step = status["step"]
    after = "" if step is None else f" {'at' if state == 'finished' else 'after'} step {step}"
    body = {
        "format_version": FORMAT_VERSION,
        "text": f"{directory.name} {state}{after}" + (f": {cause}" if cause else ""),
        "run": directory.name,
        "state": state,
        "exit_code": int(code),
        **{name: status[name] for name in ("step", "loss", "goodput", "restarts")},
        "cause": cause,
        "host": socket.gethostname(),
        "directory": str(directory.path.absolute()),
        "wandb_url": status["wandb_url"],
        "time": round(time.time(), 3),
    }
    return redact(body)


def notify(
    directory: RunDirectory,
    config: RunConfig,
    status: Mapping[str, Any],
    code: int,
    *,
    wait_s: float = WAIT_S,
    limit_s: float = LIMIT_S,
) -> str | None:
    """Start the process that sends the message about a run's end, and wait for it for at most `wait_s`.

    Args:
        directory: The run directory.
        config: The run's config.
        status: The object that `bigtrain status --json` prints.
        code: How the run ended, as a value of ExitCode.
        wait_s: Seconds to wait for the process.
        limit_s: Seconds that the command, the webhook and the alert may each take.

    Returns:
        A line for the user if the message was not sent, or is not sent yet; otherwise None.
    """
    log_path = directory.logs / "notify.log"
    order = {
        "config": config.plain(),
        "body": message(directory, status, code),
        "directory": str(directory.path.absolute()),
        "limit_s": limit_s,
    }
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(log_path, "ab") as log:
            process = subprocess.Popen(
                module_command("bigtrain.jobs.notify"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=with_source(os.environ),
                # The process may outlive this one, and Ctrl-C must not end it.
                start_new_session=True,
            )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps(order, default=str).encode())
        failed = process.wait(wait_s)
    except subprocess.TimeoutExpired:
        return f"the notification is still being sent, for at most {3 * limit_s:.0f} s; see {log_path}"
    except OSError as error:
        return f"the notification could not be sent: {error}"
    return f"the notification was not sent; see {log_path}" if failed else None


def main() -> int:
    """Send the message of the JSON object on standard input; returns the number of failures."""
    order = json.load(sys.stdin)
    where, limit_s = order["config"]["job"]["notify"], order["limit_s"]
    # Ends this process even if something below hangs.
    limit = threading.Timer(3 * limit_s, os._exit, [1])
    limit.daemon = True
    limit.start()
    failures: list[str] = []
    if where["command"]:
        failures += _run(where["command"], order["body"], limit_s)
    url = os.environ.get(where["webhook_variable"], "") if where["webhook_variable"] else where["webhook"]
    if where["webhook_variable"] and not url:
        failures.append(f"the variable {where['webhook_variable']}, which holds the webhook's address, is not set")
    elif url:
        failures += _post(url, order["body"], limit_s)
    if where["wandb"]:
        failures += _alert(order, limit_s)
    for line in failures:
        print(line, file=sys.stderr)
    return len(failures)


def _run(command: list[str], body: dict[str, Any], limit_s: float) -> list[str]:
    """Run the user's command with the body on its standard input. After `limit_s` it and its children are killed.

    Returns:
        Sentences about failures; empty on success.
    """
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return [f"{command[0]}: {error.strerror or error}"]
    try:
        output, _ = process.communicate(json.dumps(body).encode(), timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return [f"{command[0]} took longer than {limit_s:g} s and was ended"]
    if process.returncode == 0:
        return []
    said = redact_text(output[-MAX_OUTPUT:].decode(errors="replace")).strip()
    return [f"{command[0]} exited with {process.returncode}" + (f": {said}" if said else "")]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a webhook that has moved is reported as a failure."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def _post(url: str, body: dict[str, Any], limit_s: float) -> list[str]:
    """POST the body, and retry after a server error. The URL may be a secret, so only its host is printed.

    Returns:
        Sentences about failures; empty on success.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return ["the webhook's address is not an http or https URL"]
    opener = urllib.request.build_opener(_NoRedirect)
    headers = {"Content-Type": "application/json", "User-Agent": "bigtrain"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    deadline = time.monotonic() + limit_s
    failure = ""
    for number in range(TRIES):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        try:
            with opener.open(request, timeout=left_s):
                return []
        except urllib.error.HTTPError as error:
            failure = f"HTTP {error.code}"
            error.close()
            if error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            failure = f"no answer within {limit_s:g} s" if isinstance(reason, TimeoutError) else type(reason).__name__
        if number + 1 < TRIES:
            time.sleep(min(2.0**number, max(0.0, deadline - time.monotonic())))
    return [f"the webhook on {parts.hostname}: {failure}"]


def _alert(order: dict[str, Any], limit_s: float) -> list[str]:
    """Create a W&B alert for the run; W&B sends it by e-mail or to Slack, as set in the user's account.

    Returns:
        Sentences about failures; empty on success.
    """
    from bigtrain.tracking.config import TrackingConfig
    from bigtrain.tracking.trackers.wandb import choose_mode, send_alert

    config, body = order["config"], order["body"]
    tracking = TrackingConfig.model_validate(config["tracking"])
    if choose_mode(tracking.wandb, os.environ) != "online":
        return ["no alert was sent: W&B is not online here (there is no key, or tracking.wandb is not online)"]
    failure = send_alert(
        Path(order["directory"]), config, tracking, title=f"{body['run']}: {body['state']}", text=body["text"],
        failed=body["state"] == "failed", timeout_s=limit_s,
    )  # fmt: skip
    return [] if failure is None else [failure]


if __name__ == "__main__":
    sys.exit(main())
