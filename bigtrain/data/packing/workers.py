"""Runs the workers of a packing in several processes, or in this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from bigtrain.config import UserError


class PackError(UserError):
    """A worker process has died. The exit code is 1, because the same command can continue."""

    exit_code = 1


class Pool(Protocol):
    """Calls methods of a worker by name."""

    ahead: int
    """Number of tasks that should be in progress at the same time."""

    def submit(self, method: str, *arguments: Any) -> Future[None]:
        """Submit one task: a call of a worker's method."""
        ...


class _Here:
    """Runs each task in this process, when it is submitted."""

    ahead = 1

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def submit(self, method: str, *arguments: Any) -> Future[None]:
        future: Future[None] = Future()
        getattr(self._worker, method)(*arguments)
        future.set_result(None)
        return future


class _Processes:
    def __init__(self, executor: ProcessPoolExecutor, workers: int) -> None:
        self._executor = executor
        self.ahead = 3 * workers

    def submit(self, method: str, *arguments: Any) -> Future[None]:
        return self._executor.submit(_work, method, arguments)


@contextlib.contextmanager
def open_pool(workers: int, make: Callable[[], Any]) -> Iterator[Pool]:
    """Start workers, which end with the context or with this process.

    Args:
        workers: Number of processes; 1: this process.
        make: Makes the worker, in each process.

    Raises:
        PackError: A worker process died.
    """
    if workers == 1:
        yield _Here(make())
        return
    # Forking would copy the locks of the threads that libraries have started.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start, (make,))
    try:
        yield _Processes(executor, workers)
    except BrokenProcessPool:
        raise PackError(
            "a worker process died: killed, or out of memory",
            fix="Run the same command again with fewer --workers: it continues from the finished work.",
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_worker: Any = None
"""The worker of this process, which serves one packing."""


def _start(make: Callable[[], Any]) -> None:
    global _worker
    # The workers share the CPU cores. Without this setting, each worker would start threads for every text.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _worker = make()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(method: str, arguments: tuple[Any, ...]) -> None:
    getattr(_worker, method)(*arguments)
