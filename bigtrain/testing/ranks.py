"""Ranks for tests: processes that stay warm, each in a gloo group on this machine's CPU.

    def total(value: float) -> float:                  # a function of a module, not of another function
        tensor = torch.tensor(value * dist.get_rank())
        dist.all_reduce(tensor)
        return float(tensor)

    with RankPool(4) as pool:
        assert pool.run(total, 2.0, ranks=4) == [12.0] * 4      # what each rank returned, by rank
        assert pool.run(total, 2.0, ranks=2) == [2.0] * 2

In tests, `ranks` is a fixture that holds such a pool for the whole session.

One process, the nursery, imports torch once and forks the ranks, so that a pool costs one import whatever its size.
The ranks stay: a run costs only the set-up of its process group, which is new for each run. What else a function
leaves behind in its process (torch's determinism, its default dtype) stays as well.

A function that raises fails the run at once: its rank ends, which breaks the connections that the others wait on, and
`RankError` shows its traceback. A run past its time is ended too, and the error shows where each rank stood. In both
cases all ranks are replaced, so the next run finds a sound pool.
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
"""How long the other ranks may take to report once one has failed; the first failure is the one that counts."""
STACKS_S = 0.5
MOST_THREADS = 100
"""Of a rank that is kept. torch holds on to the threads of process groups that have been destroyed, some 15 a run, and
each wakes up a hundred times a second: after 60 runs idle ranks took a third of a core each."""


class RankError(RuntimeError):
    """A rank raised, died or hung.

    Attributes:
        rank: The one that failed first.
        report: Its traceback, or where it stood.
    """

    def __init__(self, rank: int, what: str, report: str) -> None:
        super().__init__(f"rank {rank} {what}\n{report}".rstrip())
        self.rank = rank
        self.report = report


@dataclass(frozen=True)
class _Task:
    """What a rank is asked to run."""

    size: int
    store: str
    timeout_s: float
    path: list[str]
    module: str
    file: str
    function: str
    arguments: bytes
    """Pickled apart, since reading them may need the module."""


@dataclass(frozen=True)
class _Answer:
    """What a rank returned, or how it failed."""

    value: Any = None
    error: str = ""
    report: str = ""
    failed_at: float = 0.0
    """CLOCK_MONOTONIC, which all processes share: the first failure is the cause of the others."""


class RankPool:
    """`size` processes that run functions together; see the module's docstring."""

    def __init__(self, size: int = 4, timeout_s: float = RUN_TIMEOUT_S) -> None:
        """Nothing is started before the first run.

        Args:
            size: Ranks of the largest run.
            timeout_s: How long a run may take, unless it says otherwise.
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
        """Call a function on ranks 0 .. ranks - 1 at once, inside a process group of just these.

        RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set as torchrun sets them.

        Args:
            function: Of a module; the ranks find it by the module's file, so a test's own function serves.
            arguments: Picklable, the same for all ranks.
            ranks: How many run it, at most `size`.
            timeout_s: How long it may take; None: the pool's.

        Returns:
            What each rank returned, by rank; picklable.

        Raises:
            RankError: A rank raised, died, or did not return in time. The pool has new ranks then.
            ValueError: More ranks than the pool has, or a function that the ranks could not find.
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
            # Whatever went wrong, an interruption too: nobody knows what these ranks are in the middle of.
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
        """Have the nursery fork ranks, which end those that were there, and wait until each has called back."""
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
        """The answers of all ranks; the first failure, as soon as the others had a moment to fail from it."""
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
        """Where ranks stand now, as their own fault handlers tell it."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[rank], signal.SIGUSR1)
        time.sleep(STACKS_S)
        files = [(rank, self._place / f"stack-{self._pids[rank]}") for rank in ranks]
        return "\n".join(f"rank {rank}:\n{file.read_text()}" for rank, file in files if file.exists())

    def _end_ranks(self) -> None:
        """Let go of the ranks; the nursery kills them before it forks the next, or when it ends itself."""
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
        # Before any exception: a death is a cause, an exception may be its consequence.
        return _Answer(error="died without an answer", failed_at=0.0)
    return _Answer(*answer)


def _source(function: Callable[..., object]) -> tuple[str, str]:
    """The name and the file of a function's module."""
    module, name = function.__module__, function.__qualname__
    if not inspect.isfunction(function) or module == "__main__" or "<" in name:
        raise ValueError(f"{name} cannot be sent to ranks: they find functions of modules, at the top level, by name")
    return module, str(inspect.getsourcefile(function))


def _environment() -> dict[str, str]:
    """One thread a rank, no GPU, and a network interface that is always there."""
    own = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return with_source(os.environ) | own


def _nursery(directory: Path, size: int) -> None:
    """Fork ranks on demand: lines of "fork" and "end" on the standard input; its end is the end of all."""
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
            # Here too, for a pool whose process was killed.
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
    """The life of a rank: one task after another, until the pool hangs up or a task fails."""
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
                # Without atexit handlers, which might wait for the other ranks.
                os._exit(1)


def _perform(task: _Task, rank: int) -> Any:
    import torch.distributed as dist

    sys.path[:] = task.path
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(task.size), LOCAL_WORLD_SIZE=str(task.size))
    function: Any = _load(task.module, task.file)
    for name in task.function.split("."):
        function = getattr(function, name)
    arguments = pickle.loads(task.arguments)  # noqa: S301 - from the process that started this one
    # The pool's own limit comes first: it tells where all ranks stand.
    timeout = timedelta(seconds=task.timeout_s + START_TIMEOUT_S)
    dist.init_process_group(
        "gloo", init_method=f"file://{task.store}", rank=rank, world_size=task.size, timeout=timeout
    )
    # A rank whose function sends nothing would else close its connections while another still makes its own.
    dist.barrier()
    value = function(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
    return value


def _load(name: str, file: str) -> ModuleType:
    """A module by name, or from its file where a test runner gave it a name that cannot be imported."""
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
    # Under its own name, which is what pickled tasks refer to.
    from bigtrain.testing import ranks

    ranks._nursery(Path(sys.argv[1]), int(sys.argv[2]))
