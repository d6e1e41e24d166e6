"""Ranks for tests: processes on this machine's CPU that are reused from run to run, with a gloo group for each run.

    def total(value: float) -> float:                  # a function of a module, not of another function
        tensor = torch.tensor(value * dist.get_rank())
        dist.all_reduce(tensor)
        return float(tensor)

    with RankPool(4) as pool:
        assert pool.run(total, 2.0, ranks=4) == [12.0] * 4      # what each rank returned, by rank
        assert pool.run(total, 2.0, ranks=2) == [2.0] * 2

In tests, the fixture `ranks` is such a pool for the full session.

One process, the nursery, imports torch once and forks the ranks, so a pool of any size needs one import. Ranks are
reused, so a run costs only the set-up of its new process group. Other global state that a function changes in its
process (torch's determinism, the default dtype) stays changed.

If a function raises, the run fails at once: its rank exits, which breaks the connections on which other ranks wait, and
`RankError` shows the traceback. A run that exceeds its time limit is ended too, and the error shows the stack of each
rank that has not returned. In both cases all ranks are replaced, so that the next run starts with new processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import inspect
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from bigtrain.children import with_source

T = TypeVar("T")

START_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 120.0
AFTERMATH_S = 2.0
"""How long to wait for reports of other ranks after one has failed; the rank that failed first is reported."""
STACKS_S = 0.5
"""How long to wait until ranks have written their stacks."""
MOST_THREADS = 100
"""Ranks with more threads are replaced. torch keeps the threads of destroyed process groups, about 15 per run, and each
wakes up 100 times a second. After 60 runs each idle rank used a third of a core."""


class RankError(RuntimeError):
    """A rank raised an exception, died or did not return in time.

    Attributes:
        rank: The rank that failed first.
        report: Its traceback, or the stacks of the ranks that did not return.
    """

    def __init__(self, rank: int, what: str, report: str) -> None:
        super().__init__(f"rank {rank} {what}\n{report}".rstrip())
        self.rank = rank
        self.report = report


@dataclass(frozen=True)
class _Task:
    """The function that a rank is to run."""

    size: int
    store: str
    timeout_s: float
    path: list[str]
    module: str
    file: str
    function: str
    arguments: bytes
    """Arguments, pickled separately because unpickling them may need the function's module."""


@dataclass(frozen=True)
class _Answer:
    """The value that a rank returned, or its failure."""

    value: Any = None
    error: str = ""
    report: str = ""
    failed_at: float = 0.0
    """Time of the failure by CLOCK_MONOTONIC, which all processes share; the first failure caused the others."""


class RankPool:
    """`size` processes that run functions together; see the module's docstring."""

    def __init__(self, size: int = 4, timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Create a pool; processes are started by the first run.

        Args:
            size: Number of ranks of the largest run.
            timeout_s: Time limit of a run that sets none.
        """
        if size < 1:
            raise ValueError(f"a pool needs at least one rank, not {size}")
        self.size = size
        self._timeout_s = timeout_s
        self._nursery: subprocess.Popen[bytes] | None = None
        self._server: socket.socket | None = None
        self._directory: Path | None = None
        self._ranks: list[Connection] = []
        self._pids: list[int] = []
        self._runs = 0

    def run(
        self, function: Callable[..., T], *arguments: Any, ranks: int = 2, timeout_s: float | None = None
    ) -> list[T]:
        """Call a function on ranks 0 to `ranks` - 1 at the same time, in a process group of these ranks.

        RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set as torchrun sets them.

        Args:
            function: A function at the top level of a module, such as a test module; ranks load it from the file.
            arguments: Arguments of the function, picklable, the same for all ranks.
            ranks: Number of ranks, at most `size`.
            timeout_s: Time limit in seconds; None: the pool's limit.

        Returns:
            The return value of each rank, by rank. Values must be picklable.

        Raises:
            RankError: A rank raised an exception, died, or did not return in time. All ranks of the pool are replaced.
            ValueError: The run has more ranks than the pool, or the ranks cannot find the function.
        """
        if not 1 <= ranks <= self.size:
            raise ValueError(f"the pool has {self.size} ranks, so a run has 1 to {self.size}, not {ranks}")
        limit = self._timeout_s if timeout_s is None else timeout_s
        module, file = _source(function)
        pickled = pickle.dumps(arguments)
        if not self._ranks:
            self._start()
        self._runs += 1
        store = str(self._place / f"store-{self._runs}")
        task = _Task(ranks, store, limit, list(sys.path), module, file, function.__qualname__, pickled)
        message = pickle.dumps(task)
        try:
            for connection in self._ranks[:ranks]:
                connection.send_bytes(message)
            values = [answer.value for answer in self._collect(ranks, limit)]
            if max(map(_threads, self._pids)) > MOST_THREADS:
                self._end_ranks()
            return values
        except BaseException:
            # After any exception, also KeyboardInterrupt, the state of these ranks is unknown.
            self._end_ranks()
            raise
        finally:
            Path(store).unlink(missing_ok=True)

    def close(self) -> None:
        """End all processes and remove the pool's directory; a later run starts new ones."""
        self._end_ranks()
        if self._nursery is not None:
            assert self._nursery.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._nursery.stdin.close()
            self._nursery.wait()
            self._nursery = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _place(self) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="bigtrain-ranks-"))
        return self._directory

    def _start(self) -> None:
        """Let the nursery kill its ranks and fork new ones, and wait until each of them has connected."""
        if self._nursery is None or self._server is None:
            self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._server.bind(str(self._place / "socket"))
            self._server.listen(self.size)
            self._server.settimeout(START_TIMEOUT_S)
            self._nursery = subprocess.Popen(
                # Not `module_command`: tests may import modules of their working directory.
                [sys.executable, "-m", "bigtrain.testing.ranks", str(self._place), str(self.size)],
                stdin=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(b"fork\n")
        self._nursery.stdin.flush()
        called: dict[int, tuple[int, Connection]] = {}
        while len(called) < self.size:
            try:
                accepted, _ = self._server.accept()
            except TimeoutError:
                self.close()
                raise RuntimeError(f"the ranks did not start within {START_TIMEOUT_S:.0f} s") from None
            connection = Connection(accepted.detach())
            rank, pid = pickle.loads(connection.recv_bytes())  # noqa: S301 - a process that this one started
            called[rank] = (pid, connection)
        self._pids = [called[rank][0] for rank in range(self.size)]
        self._ranks = [called[rank][1] for rank in range(self.size)]

    def _collect(self, ranks: int, limit: float) -> list[_Answer]:
        """The answers of all ranks.

        Raises:
            RankError: A rank failed or did not return in time. After a failure, other ranks have `AFTERMATH_S` seconds
                to report failures too; the earliest one is raised.
        """
        answers: dict[int, _Answer] = {}
        deadline = time.monotonic() + limit
        while len(answers) < ranks:
            waiting = {self._ranks[rank]: rank for rank in range(ranks) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                answer = _receive(connection)
                answers[waiting[connection]] = answer
                if answer.error:
                    deadline = min(deadline, time.monotonic() + AFTERMATH_S)
        failed = {rank: answer for rank, answer in answers.items() if answer.error}
        if failed:
            first = min(failed, key=lambda rank: failed[rank].failed_at)
            raise RankError(first, failed[first].error, failed[first].report)
        missing = [rank for rank in range(ranks) if rank not in answers]
        if missing:
            raise RankError(missing[0], f"did not return within {limit:g} s", self._stacks(missing))
        return [answers[rank] for rank in range(ranks)]

    def _stacks(self, ranks: list[int]) -> str:
        """The current stacks of some ranks, which their fault handlers write on SIGUSR1."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGUSR1)
        time.sleep(STACKS_S)
        files = [(rank, self._place / f"stack-{self._pids[rank]}") for rank in ranks]
        return "\n".join(f"rank {rank}:\n{file.read_text()}" for rank, file in files if file.exists())

    def _end_ranks(self) -> None:
        """Disconnect from the ranks, and let the nursery kill them."""
        for connection in self._ranks:
            connection.close()
        if self._ranks and self._nursery is not None and self._nursery.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._nursery.stdin.write(b"end\n")
                self._nursery.stdin.flush()
        self._ranks, self._pids = [], []


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _receive(connection: Connection) -> _Answer:
    try:
        answer = pickle.loads(connection.recv_bytes())  # noqa: S301 - a process that this one started
    except (EOFError, ConnectionResetError):
        # Time 0 is before any exception: the death of a rank causes exceptions on other ranks.
        return _Answer(error="died without an answer", failed_at=0.0)
    return _Answer(*answer)


def _source(function: Callable[..., object]) -> tuple[str, str]:
    """The name and the file of a function's module."""
    module, name = function.__module__, function.__qualname__
    if not inspect.isfunction(function) or module == "__main__" or "<" in name:
        raise ValueError(f"{name} cannot be sent to ranks: they find functions of modules, at the top level, by name")
    return module, str(inspect.getsourcefile(function))


def _environment() -> dict[str, str]:
    """Environment of the ranks: one thread each, no GPU, and the loopback interface, which always exists."""
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return with_source(os.environ) | own


def _nursery(directory: Path, size: int) -> None:
    """Fork ranks on the line "fork" of the standard input, after killing those of before; "end" only kills them.

    The end of the input ends the nursery.
    """
    import bigtrain.engines.fsdp.engine  # noqa: F401 - imported once, for all ranks

    pids: list[int] = []
    while True:
        line = sys.stdin.buffer.readline()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        pids = []
        if not line:
            # `RankPool.close` removes the directory too, but not if the pool's process was killed.
            shutil.rmtree(directory, ignore_errors=True)
            return
        if line != b"fork\n":
            continue
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                _serve(directory, rank)
            pids.append(pid)


def _serve(directory: Path, rank: int) -> None:
    """Run a rank: perform one task after another until the pool disconnects or a task fails; never returns."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.connect(str(directory / "socket"))
    connection = Connection(channel.detach())
    connection.send_bytes(pickle.dumps((rank, os.getpid())))
    with (directory / f"stack-{os.getpid()}").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks)
        while True:
            try:
                message = connection.recv_bytes()
            except (EOFError, ConnectionResetError):
                os._exit(0)
            try:
                task = pickle.loads(message)  # noqa: S301 - from the process that started this one
                reply = pickle.dumps((_perform(task, rank),))
                failed = False
            except BaseException as error:  # noqa: BLE001 - reported, whatever it is
                at = time.monotonic()
                what = f"raised {type(error).__name__}: {error}"
                reply = pickle.dumps((None, what, traceback.format_exc(), at))
                failed = True
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send_bytes(reply)
            if failed:
                # os._exit runs no atexit handlers, which might wait for other ranks.
                os._exit(1)


def _perform(task: _Task, rank: int) -> Any:
    import torch.distributed as dist

    sys.path[:] = task.path
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task.size), LOCAL_WORLD_SIZE=str(task.size))
    function: Any = _load(task.module, task.file)
    for name in task.function.split("."):
        function = getattr(function, name)
    arguments = pickle.loads(task.arguments)  # noqa: S301 - from the process that started this one
    # The group's timeout is longer than the pool's own limit, whose error shows the stacks of all ranks.
    timeout = timedelta(seconds=task.timeout_s + START_TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{task.store}", rank=rank, world_size=task.size, timeout=timeout
    )
    # Without the barrier, a rank whose function communicates nothing might close its connections before others connect.
    dist.barrier()
    value = function(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
    return value


def _load(name: str, file: str) -> ModuleType:
    """Import a module by name, or from its file if a test runner gave it a name that cannot be imported."""
    if name in sys.modules:
        return sys.modules[name]
    with contextlib.suppress(ModuleNotFoundError):
        found = importlib.util.find_spec(name)
        if found is not None and found.origin == file:
            return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # Pickled tasks refer to the module's own name, not to __main__.
    from bigtrain.testing import ranks

    ranks._nursery(Path(sys.argv[1]), int(sys.argv[2]))
