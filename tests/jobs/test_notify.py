"""Notifications of a run's end, by real commands and real HTTP servers."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bigtrain.jobs.config import JobConfig, NotifyConfig
from bigtrain.jobs.ending import tell_end
from bigtrain.jobs.notify import notify
from bigtrain.run import ExitCode, RunConfig, RunDirectory, load_config
from bigtrain.tracking.status import status

CANARY = "canary" + "7" * 30


@contextmanager
def server(*answers: int | str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server that answers one request after the other with a status, or hangs; and the bodies it got."""
    got: list[dict[str, Any]] = []
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            answer = answers[min(len(got), len(answers)) - 1]
            if isinstance(answer, str):
                released.wait(60)
                return
            self.send_response(answer)
            self.send_header("location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/hook", got
        finally:
            released.set()
            http.shutdown()
            thread.join()


@pytest.fixture
def ended(tmp_path: Path) -> RunDirectory:
    """A run that has failed."""
    directory = RunDirectory(tmp_path / "runs" / "tiny")
    directory.path.mkdir(parents=True)
    directory.event("started", step=0, total_steps=20)
    directory.metrics.write_text('{"step": 7, "tokens": 700, "loss": 2.5, "tokens_per_s": 100.0}\n')
    directory.event("fault", cause="rank 1 on host a was killed by SIGKILL at step 8", step=8)
    directory.event("failed", cause=f"4 failures: https://user:{CANARY}@host/x")
    return directory


@pytest.fixture
def notified(write_config: Callable[..., Path], ended: RunDirectory) -> Callable[..., str | None]:
    """Sends the notification of the run's end that `job.notify` configures; returns the line for the user."""

    def send(notify_section: dict[str, Any], **options: Any) -> str | None:
        config = load_config(write_config(job={"notify": notify_section}))
        return notify(ended, config, status(ended.path, alive=False), ExitCode.FAILED, **{"wait_s": 60.0, **options})

    return send


def test_a_command_and_a_webhook_get_the_documented_message(
    notified: Callable[..., str | None], ended: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "notified.json"
    script = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    with server(500, 200) as (url, got):
        monkeypatch.setenv("MY_HOOK", f"{url}/{CANARY}")
        assert notified({"command": [sys.executable, "-c", script, str(out)], "webhook_variable": "MY_HOOK"}) is None
    first, second = got
    assert first == second == json.loads(out.read_text())
    assert second["text"].startswith("tiny failed after step 7: 4 failures")
    assert {name: second[name] for name in ("run", "state", "exit_code", "step", "loss", "restarts")} == {
        "run": "tiny", "state": "failed", "exit_code": 1, "step": 7, "loss": 2.5, "restarts": 0,
    }  # fmt: skip
    assert second["directory"] == str(ended.path)
    assert CANARY not in json.dumps(second)
    assert (ended.logs / "notify.log").read_text() == ""


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"command": ["/no/such/program"]}, "No such file"),
        ({"command": [sys.executable, "-c", "import sys; sys.exit('API_KEY=" + CANARY + "')"]}, "exited with 1"),
        ({"command": ["sleep", "1000"]}, "took longer than 1 s"),
        ({"webhook_variable": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE, which holds the webhook's address, is not set"),
        ({"webhook": 302}, "HTTP 302"),
        ({"webhook": 500}, "HTTP 500"),
        ({"wandb": True}, "no alert"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_what_goes_wrong_is_a_line_and_no_secret(
    notified: Callable[..., str | None], ended: RunDirectory, section: dict[str, Any], said: str
) -> None:
    with server(section.get("webhook", 200)) as (url, _):
        line = notified({**section, **({"webhook": url} if "webhook" in section else {})}, limit_s=1.0)
    assert line is not None
    assert str(ended.logs / "notify.log") in line
    log = (ended.logs / "notify.log").read_text()
    assert said in log
    assert CANARY not in log
    assert len(log.splitlines()) == 1


@pytest.mark.slow
def test_a_webhook_that_hangs_keeps_nobody(write_config: Callable[..., Path], ended: RunDirectory) -> None:
    with server("hang") as (url, got):
        config = load_config(write_config(job={"notify": {"webhook": url}}))
        began = time.monotonic()
        line = notify(ended, config, status(ended.path, alive=False), ExitCode.FAILED, wait_s=0.2, limit_s=3.0)
        assert "still being sent" in str(line)
        assert time.monotonic() - began < 30
        while not got:
            time.sleep(0.02)
        # It ends by itself, and leaves no process behind.
        while _children_of_notify(ended):
            assert time.monotonic() - began < 60
            time.sleep(0.05)
    assert "the webhook on 127.0.0.1: no answer within 3 s" in (ended.logs / "notify.log").read_text()


def _children_of_notify(directory: RunDirectory) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command, here = Path(f"/proc/{pid}/cmdline").read_bytes(), os.readlink(f"/proc/{pid}/fd/1")
        except OSError:
            continue
        if b"bigtrain.jobs.notify" in command and here == str(directory.logs / "notify.log"):
            found.append(int(pid))
    return found


def test_the_notification_reports_the_runs_goodput(write_config: Callable[..., Path], ended: RunDirectory) -> None:
    stream = io.StringIO()
    config: RunConfig = load_config(write_config(job={"notify": {"command": ["false"]}}))
    tell_end(ended, config, ExitCode.FAILED, stream)
    summary, said = stream.getvalue().splitlines()
    assert summary.startswith("tiny: goodput ")
    assert "was not sent" in said


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, "name a command"),
        ({"webhook": "ftp://host/x"}, "http or https"),
        ({"webhook": "https://host/x?token=1"}, "webhook_variable"),
        ({"webhook": "https://user:secret@host/x"}, "webhook_variable"),
        ({"webhook": "https://host/x", "webhook_variable": "X"}, "not both"),
        ({"command": []}, "at least 1 item"),
    ],
)
def test_what_cannot_be_meant_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        NotifyConfig.model_validate(section)
    assert JobConfig().notify is None
