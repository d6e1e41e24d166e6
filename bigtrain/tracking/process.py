"""The trainer's side of trackers, for which no training step waits.

    put() --bounded queue--> one daemon thread --pipe--> tracker_process.py, which opens the tracker

A tracker runs in a separate process. Its library may hold the GIL during its import, install hooks for exit and
exceptions, or wait for its uploads or for a slow disk. The trainer can kill a process that does not finish.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigtrain.children import module_command, with_source
from bigtrain.config.plugin import plugin_environment
from bigtrain.tracking.config import TrackedRun, TrackerConfig, TrackingConfig
from bigtrain.tracking.metrics import plain
from bigtrain.tracking.redact import redact, redact_text
from bigtrain.tracking.tracker_process import READY

_log = logging.getLogger(__name__)

QUEUE_SIZE = 10_000
_POLL_S = 0.5


class Trackers:
    """All trackers of a run, or of something else that has a directory, a name and a config.

    Args:
        directory: Directory of the run.
        name: Name of the run.
        config: Config of the run; secrets are removed before it is passed on.
        tracking: The section `tracking`.
        warn: Called with a tracker's name and a warning of one line; called from several threads.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        config: Mapping[str, Any],
        tracking: TrackingConfig,
        warn: Callable[[str, str], None] = lambda name, line: _log.warning(line),
    ) -> None:
        run = TrackedRun(directory, name, {**config, **tracking.facts})

        def warn_of(tracker: str) -> Callable[[str], None]:
            return lambda line: warn(tracker, line)

        self._processes = [
            TrackerProcess(tracker, run, warn=warn_of(tracker.name))
            for tracker in tracking.all_trackers()
            if tracker.starts(run)
        ]

    def put(self, row: Mapping[str, Any]) -> None:
        """Queue one object of metrics.jsonl for all trackers, without waiting."""
        for process in self._processes:
            process.put(row)

    def close(self, timeout_s: float) -> None:
        """Close all trackers, which together have `timeout_s` seconds to finish."""
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.close(max(0.0, deadline - time.monotonic()))


class _Abandoned(Exception):
    """The time limit of close() was reached while the tracker was still starting."""


class TrackerProcess:
    """The process of one tracker. Objects that do not fit into its queue are dropped and counted in `dropped`.

    Args:
        tracker: The tracker's section.
        run: The run to track. Secrets are removed from its config before it is sent to the process.
        warn: Called with a warning of one line; called from a thread, only a few times in a run.
        queue_size: Largest number of waiting objects.
    """

    def __init__(
        self,
        tracker: TrackerConfig,
        run: TrackedRun,
        *,
        warn: Callable[[str], None] = _log.warning,
        queue_size: int = QUEUE_SIZE,
    ) -> None:
        self.dropped = 0
        self._tracker = tracker
        self._warn = warn
        self._directory = run.directory / tracker.name
        self._first_line = {
            "tracker": tracker.plain(), "plugins": plugin_environment(), "directory": str(run.directory),
            "name": run.name, "config": redact(plain(dict(run.config))),
        }  # fmt: skip
        self._starts = tracker.starts(run)
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(queue_size)
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._warned: set[str] = set()
        self._unread = b""
        self._thread = threading.Thread(target=self._work, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def put(self, metrics: Mapping[str, Any]) -> None:
        """Queue the metrics of one step, without waiting. If the queue is full, they are dropped and counted."""
        try:
            self._queue.put_nowait(dict(metrics))
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 30.0) -> None:
        """Send the waiting objects and end the tracker; after `timeout_s` seconds its process is killed."""
        deadline = time.monotonic() + timeout_s
        if not self._closing.is_set():
            self._closing.set()
            # If the queue is full, the thread checks _closing once the queue is empty.
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._abandon(timeout_s)
        if self.dropped:
            self._warn_once(
                f"{self._label} could not keep up: {self.dropped} steps were not sent; metrics.jsonl has all of them"
            )

    def _abandon(self, timeout_s: float) -> None:
        self._abandoned.set()
        if self._process is not None:
            self._process.kill()
        self._thread.join(1.0)
        self._warn_once(
            f"{self._label} did not finish within {timeout_s:.0f} s and was stopped; its files are in "
            f"{self._directory}{self._advice}"
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
            _log.debug("%s was stopped while it was starting", self._label)
        except BrokenPipeError:
            self._explain_end()
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            if not self._abandoned.is_set():
                self._warn_once(
                    f"{self._label} is disabled from now on: {type(error).__name__}: {redact_text(str(error))}"
                )
        finally:
            self._discard()

    @property
    def _label(self) -> str:
        return self._tracker.label

    @property
    def _advice(self) -> str:
        return f"; {self._tracker.advice}" if self._tracker.advice else ""

    def _start_run(self) -> subprocess.Popen[bytes]:
        """Start the process by the first alternative of `TrackerConfig.starts` that succeeds."""
        for number, start in enumerate(self._starts, 1):
            process, failure = self._try_start(start)
            if failure is None:
                return process
            if number == len(self._starts):
                raise RuntimeError(failure)
            self._warn_once(f"{self._label} cannot be reached; continuing offline ({failure}){self._advice}")
        raise RuntimeError("the tracker defines no way to start")

    def _try_start(self, start: dict[str, Any]) -> tuple[subprocess.Popen[bytes], str | None]:
        self._process = process = self._launch()
        if self._abandoned.is_set():
            process.kill()
        self._send({**self._first_line, "start": start})
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
        self._directory.mkdir(parents=True, exist_ok=True)
        environment = with_source(os.environ) | self._tracker.environment(self._directory)
        with open(self._directory / "client.log", "ab") as log:
            return subprocess.Popen(
                module_command("bigtrain.tracking.tracker_process", self._tracker.name),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
            )  # fmt: skip

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
        """Forward the warnings that the process has printed, one for each line."""
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
            self._warn_once(
                f"{self._label} is disabled from now on: its process ended with {code}; see "
                f"{self._directory}/client.log"
            )

    def _discard(self) -> None:
        """Close the pipes, and until close() drop and count queued objects, so that they hold no memory."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                try:
                    if pipe is not None:
                        pipe.close()
                except BrokenPipeError:
                    continue  # unsent bytes for a process that has ended
        while not self._closing.is_set() or not self._queue.empty():
            try:
                if self._queue.get(timeout=_POLL_S) is not None:
                    self.dropped += 1
            except queue.Empty:
                continue
