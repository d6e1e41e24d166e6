"""Workers for a packing: processes, or this one."""

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
    """A worker that died: exit code 1, since the same command goes on."""

    exit_code = 1


class Pool(Protocol):
    """Does the methods of a worker by name."""

    ahead: int
    """Pieces of work to have under way."""

    def submit(self, method: str, *arguments: Any) -> Future[None]:
        """Have one piece of work done."""
        ...


class _Here:
    """Does each piece of work when its result is requested, in this process."""

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
    """Workers; they end with the block, or with this process.

    Args:
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
            fix="run the same command again, with fewer --workers: it goes on from what is done",
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_worker: Any = None
"""Of a worker process, which serves one packing."""


def _start(make: Callable[[], Any]) -> None:
    global _worker
    # The workers share the cores among them; without this, each would hand every text to threads of its own.
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
