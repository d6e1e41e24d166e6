"""Workers for a packing: processes, or this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from bigtrain.config import UserError
from bigtrain.data.pack_work import Job, Scratch, Worker
from bigtrain.data.tokenizers import Tokenizer


class PackError(UserError):
    """A worker that died: exit code 1, since the same command goes on."""

    exit_code = 1


class Pool(Protocol):
    """Does the methods of `Worker` by name."""

    ahead: int
    """Pieces of work to have under way."""

    def submit(self, method: str, *arguments: Any) -> Future[None]:
        """Have one piece of work done."""
        ...


class _Here:
    """Does each piece of work when its result is asked for, in this process."""

    ahead = 1

    def __init__(self, worker: Worker) -> None:
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
def open_pool(workers: int, job: Job, scratch: Scratch, tokenizer: Tokenizer) -> Iterator[Pool]:
    """Workers; they end with the block, or with this process.

    Raises:
        PackError: A worker process died.
    """
    if workers == 1:
        yield _Here(Worker(job, scratch, tokenizer))
        return
    # Forking would copy the locks of the threads that libraries have started.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start, (job, scratch, tokenizer.definition()))
    try:
        yield _Processes(executor, workers)
    except BrokenProcessPool:
        raise PackError(
            "a worker process died: killed, or out of memory",
            fix="run the same command again, with fewer --workers: it goes on from what is done",
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_worker: Worker | None = None
"""Of a worker process, which serves one packing."""


def _start(job: Job, scratch: Scratch, tokenizer: tuple[str, str | None] | None) -> None:
    global _worker
    _worker = Worker(job, scratch, Tokenizer.from_definition(tokenizer))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(method: str, arguments: tuple[Any, ...]) -> None:
    assert _worker is not None
    getattr(_worker, method)(*arguments)
