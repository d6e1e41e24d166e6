"""Weights & Biases, at arm's length: whatever it does, no training step waits for it.

    put() --bounded queue--> one daemon thread --pipe--> wandb_process.py, the only importer of wandb

W&B runs in a process of its own because its client holds the interpreter while it is imported, hooks the exit
and the exceptions of the process that it lives in, and waits there for its uploads. A process can be left.
"""

from __future__ import annotations

import contextlib
import json
import logging
import netrc
import os
import queue
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bigtrain.children import module_command, with_source
from bigtrain.storage import write_atomic
from bigtrain.tracking.config import TrackingConfig
from bigtrain.tracking.metrics import plain
from bigtrain.tracking.redact import redact, redact_text
from bigtrain.tracking.wandb_process import READY

_log = logging.getLogger(__name__)

QUEUE_SIZE = 10_000
INIT_TIMEOUT_S = 60.0
MAX_TEMPORARY_PATH = 56
_DEFAULT_BASE_URL = "https://api.wandb.ai"
_POLL_S = 0.5
_MAX_ID_LENGTH = 64


def has_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B would find a key: in WANDB_API_KEY, or in the netrc file under its server's name."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", _DEFAULT_BASE_URL)).hostname or ""
    path = environment.get("NETRC") or os.path.join(environment.get("HOME", ""), ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def choose_mode(wanted: str, environment: Mapping[str, str]) -> str:
    """online, offline or disabled; `auto` heeds WANDB_MODE, then whether there is a key."""
    if wanted != "auto":
        return wanted
    if environment.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return environment["WANDB_MODE"]
    return "online" if has_key(environment) else "offline"


def run_id(run_dir: Path, name: str) -> str:
    """The W&B id of a run: its name with a random suffix, drawn once and kept in RUN/wandb/id.

    The suffix keeps two people's runs of one name apart inside a project.
    """
    file = run_dir / "wandb" / "id"
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[: _MAX_ID_LENGTH - 9]
    inode = str(run_dir.stat().st_ino) if run_dir.exists() else ""
    kept, _, drawn_in = file.read_text().strip().partition("\n") if file.exists() else ("", "", "")
    # A renamed directory keeps its inode. A copy under another name is a run of its own.
    if kept and (drawn_in == inode or kept.rpartition("-")[0] == stem):
        return kept
    fresh = f"{stem}-{secrets.token_hex(4)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, f"{fresh}\n{run_dir.stat().st_ino}\n")
    return fresh


def read_url(run_dir: Path) -> str | None:
    """Where the run can be seen on W&B, or None where it was never online."""
    try:
        return (run_dir / "wandb" / "url").read_text().strip() or None
    except FileNotFoundError:
        return None


def start_tracker(run_dir: Path, name: str, config: Mapping[str, Any], tracking: TrackingConfig) -> WandbTracker | None:
    """The tracker that the `tracking` section asks for, or None where it is disabled."""
    mode = choose_mode(tracking.wandb, os.environ)
    if mode == "disabled":
        return None
    return WandbTracker(
        run_dir, name, {**config, **tracking.facts}, mode=mode, project=tracking.project, entity=tracking.entity,
        tags=tracking.tags, group=tracking.group,
    )  # fmt: skip


def send_alert(
    run_dir: Path,
    config: Mapping[str, Any],
    tracking: TrackingConfig,
    *,
    title: str,
    text: str,
    failed: bool,
    timeout_s: float,
    init_timeout_s: float | None = None,
) -> str | None:
    """Have W&B alert the user about a run that has ended; waits for it.

    Args:
        init_timeout_s: How long W&B's start may take; by default half of `timeout_s`.

    Returns:
        None where W&B has it, else why not; what it has not got is in the run's W&B file, for `wandb sync`.
    """
    said: list[str] = []
    tracker = WandbTracker(
        run_dir,
        str(config["name"]),
        config,
        mode="online",
        project=tracking.project,
        entity=tracking.entity,
        tags=tracking.tags,
        warn=said.append,
        init_timeout_s=timeout_s / 2 if init_timeout_s is None else init_timeout_s,
    )
    tracker.put({"alert": {"title": title, "text": text, "level": "ERROR" if failed else "INFO"}, "failed": failed})
    tracker.close(timeout_s)
    return said[0] if said else None


class _Abandoned(Exception):
    """close() has run out of patience with a run that was still starting."""


class WandbTracker:
    """One W&B run a run name, resumed under its id; what it cannot take in time is dropped and counted.

    Args:
        run_dir: The run's directory; W&B's files go to its `wandb` folder.
        name: The run's name.
        config: The resolved config; secrets are taken out before it leaves this process.
        mode: "online" or "offline". Online that cannot be reached at the start goes on offline.
        warn: Takes one line; called from the thread, at most a few times a run.
        queue_size: Steps that may wait to be taken.
        init_timeout_s: How long W&B's start may take before the run goes on offline.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        *,
        mode: str = "offline",
        project: str = "bigtrain",
        entity: str | None = None,
        tags: list[str] | None = None,
        group: str | None = None,
        warn: Callable[[str], None] = _log.warning,
        queue_size: int = QUEUE_SIZE,
        init_timeout_s: float = INIT_TIMEOUT_S,
    ) -> None:
        self.id = run_id(run_dir, name)
        self.dropped = 0
        self._warn = warn
        self._directory = run_dir / "wandb"
        self._start = {
            "dir": str(run_dir), "id": self.id, "name": name, "mode": mode, "project": project,
            "entity": entity, "tags": list(tags or []), "group": group, "config": redact(plain(dict(config))),
            "init_timeout_s": init_timeout_s, "trainer_pid": os.getpid(),
        }  # fmt: skip
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(queue_size)
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._warned: set[str] = set()
        self._unread = b""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, Any]) -> None:
        """Hand over one step's metrics; never waits. Where the queue is full they are dropped and counted."""
        try:
            self._queue.put_nowait(dict(metrics))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 30.0) -> None:
        """Send what is waiting and end the W&B run, for at most `timeout_s`; then leave it behind.

        What was written to RUN/wandb can be sent later with `wandb sync`.
        """
        deadline = time.monotonic() + timeout_s
        if not self._closing.is_set():
            self._closing.set()
            # Where it is full, the thread sees _closing once it has emptied it.
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._abandon(timeout_s)
        if self.dropped:
            self._warn_once(f"W&B could not keep up: {self.dropped} steps were not sent; metrics.jsonl has all of them")

    def _abandon(self, timeout_s: float) -> None:
        self._abandoned.set()
        if self._process is not None:
            self._process.kill()
        self._thread.join(1.0)
        self._warn_once(
            f"W&B did not finish within {timeout_s:.0f} s and was left; `wandb sync {self._directory}/*run-*` sends "
            "what it has written"
        )

    def _warn_once(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self._warn(line)

    def _work(self) -> None:
        try:
            self._process = self._start_run()
            while self._forward_next():
                self._relay()
            self._finish()
        except _Abandoned:
            _log.debug("W&B was left while it was starting")
        except BrokenPipeError:
            self._explain_end()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            if not self._abandoned.is_set():
                self._warn_once(f"W&B is off from here: {type(error).__name__}: {redact_text(str(error))}")
        finally:
            self._discard()

    def _start_run(self) -> subprocess.Popen[bytes]:
        """A process with a run that is under way: offline where online cannot be had."""
        if self._start["mode"] == "online":
            process, failure = self._try_start("online")
            if failure is None:
                return process
            self._warn_once(f"W&B cannot be reached, going on offline ({failure}); `wandb sync` sends the run later")
        process, failure = self._try_start("offline")
        if failure is not None:
            raise RuntimeError(failure)
        return process

    def _try_start(self, mode: str) -> tuple[subprocess.Popen[bytes], str | None]:
        self._process = process = self._launch()
        if self._abandoned.is_set():
            process.kill()
        self._send({**self._start, "mode": mode})
        assert process.stdout is not None
        answer = redact_text(process.stdout.readline().decode(errors="replace").strip())
        if answer == READY:
            os.set_blocking(process.stdout.fileno(), False)
            return process, None
        process.kill()
        code = process.wait()
        if self._abandoned.is_set():
            raise _Abandoned
        return process, answer or f"its process ended with {code}; see {self._directory / 'client.log'}"

    def _launch(self) -> subprocess.Popen[bytes]:
        # WANDB_ERROR_REPORTING: the client's own telemetry and crash reports stay here.
        environment = {"WANDB_ERROR_REPORTING": "false", **with_source(os.environ)}
        environment |= self._temporary_directory()
        with open(self._directory / "client.log", "ab") as log:
            return subprocess.Popen(
                module_command("bigtrain.tracking.wandb_process"),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
            )  # fmt: skip

    def _temporary_directory(self) -> dict[str, str]:
        """Where the client leaves sockets and scratch files: in the run, so that a kill leaves nothing elsewhere.

        A socket's path may have 107 characters; below a longer directory the system's own place is used.
        """
        place = self._directory.resolve() / "tmp"
        shutil.rmtree(place, ignore_errors=True)
        if len(str(place)) > MAX_TEMPORARY_PATH:
            return {}
        place.mkdir(parents=True, exist_ok=True)
        return {"TMPDIR": str(place)}

    def _forward_next(self) -> bool:
        try:
            item = self._queue.get(timeout=_POLL_S)
        except queue.Empty:
            return not self._closing.is_set()
        if item is None or self._abandoned.is_set():
            return False
        self._send(plain(item))
        return True

    def _send(self, value: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value, default=str).encode() + b"\n")
        self._process.stdin.flush()

    def _relay(self) -> None:
        """Pass on the warnings that the process has printed, one a line."""
        assert self._process is not None
        assert self._process.stdout is not None
        while part := self._process.stdout.read(1 << 16):
            self._unread += part
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            if line.strip():
                self._warn_once(redact_text(line.decode(errors="replace").strip()))

    def _finish(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._explain_end()

    def _explain_end(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._relay()
        if code and not self._abandoned.is_set() and not self._warned:
            self._warn_once(f"W&B is off from here: its process ended with {code}; see {self._directory}/client.log")

    def _discard(self) -> None:
        """Take what still comes and count it as dropped, so that the queue's memory is not held."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except BrokenPipeError:
                    continue  # unsent bytes of a process that is gone
        while not self._closing.is_set() or not self._queue.empty():
            try:
                if self._queue.get(timeout=_POLL_S) is not None:
                    self.dropped += 1
            except queue.Empty:
                continue
