"""A template: a process that has imported the modules of a rank, and forks ranks, which thus start without imports.

    python -m bigtrain.jobs.template MODULE      started by the agent (`Template`), with a socket as its standard input

The template initialises nothing: no device, no process group, no thread pool, no random state. Before each fork it
checks that it has only one thread. A rank is forked twice, so that the kernel makes it a child of the agent. The
agent then controls it like a rank that it started itself: the rank dies with the agent, leads a session, and its exit
is seen at once. In /proc, the rank also shows a rank's environment and command line. The slots of a sweep on this
machine enable templates (BIGTRAIN_TEMPLATE=1); other runs start new processes unless the variable is set.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bigtrain import variables
from bigtrain.children import module_command
from bigtrain.jobs.processes import adopt_descendants, bind_to_parent, bound_to_parent

OWN_VARIABLES: Final = frozenset({
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    variables.RUN, variables.ATTEMPT, variables.LEASE, variables.PAGE,
})  # fmt: skip
"""Variables that may differ between a template and its ranks: no imported module reads them before a rank starts."""
ROOM_BYTES: Final = 8192
"""Space in the template's environment for the OWN_VARIABLES of a rank."""
FORK_S: Final = 5.0
"""How long a fork may take, in seconds; on an idle machine it takes 20 ms."""
CONTROL_BYTES: Final = 1 << 17
_RANK_MODULES: Final = ("bigtrain.training.", "bigtrain.testing.")
_IMPORTED_TOO: Final = ("bigtrain.training.session",)


class TemplateFailed(Exception):
    """The template could not fork a rank."""


def can_fork(module: str, environment: Mapping[str, str]) -> bool:
    """Whether ranks of this module should be forked.

    That holds for bigtrain's own ranks on a machine without a GPU driver, if `environment` enables templates.
    """
    devices = any(name.startswith("nvidia") or name == "kfd" for name in os.listdir("/dev"))
    return module.startswith(_RANK_MODULES) and not devices and environment.get(variables.TEMPLATE) == "1"


class Template:
    """The agent's side of a template.

    Args:
        module: The module whose `main` each rank runs.
        environment: The environment of the first rank; other ranks may differ from it only in OWN_VARIABLES.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._module = module
        self._environment = _shared(environment)
        self._control, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(FORK_S)
        self.ready = self.over = False
        """`ready`: whether the template can fork. `over`: whether it can never fork again."""
        with child_end:
            self._process = subprocess.Popen(
                module_command("bigtrain.jobs.template", module),
                stdin=child_end.fileno(),
                # The template prints to the agent's stderr; each rank has its own log.
                stdout=2,
                env=self._environment | {variables.TEMPLATE_ROOM: "-" * ROOM_BYTES},
                start_new_session=True,
                # Safe here: the agent has one thread.
                preexec_fn=bound_to_parent(),
            )
        self.pid = self._process.pid

    def fits(self, module: str, environment: Mapping[str, str]) -> bool:
        """Whether a rank that is forked from this template equals a rank in a new process."""
        own = sum(len(os.fsencode(f"{name}={environment.get(name, '')}")) + 1 for name in OWN_VARIABLES)
        return (module, _shared(environment)) == (self._module, self._environment) and own < ROOM_BYTES

    def look(self) -> None:
        """Update `ready` and `over` without waiting."""
        if self._process.poll() is not None:
            self.ready, self.over = False, True
        elif not self.ready and not self.over:
            with contextlib.suppress(OSError):
                self.ready = self._control.recv(CONTROL_BYTES, socket.MSG_DONTWAIT) == b"ready"

    def fork(self, environment: Mapping[str, str], arguments: Sequence[str], log: int, page: int) -> int:
        """Fork a rank.

        Args:
            environment: All environment variables of the rank, except the descriptor of its heartbeat page.
            arguments: Command-line arguments of the rank.
            log: File descriptor of the rank's log, which receives its stdout and stderr.
            page: File descriptor of the rank's heartbeat page.

        Returns:
            The process id of the rank, which is a child of this process.

        Raises:
            TemplateFailed: The rank was not started, and the template cannot be used any more.
        """
        own = {name: environment[name] for name in sorted(OWN_VARIABLES) if name in environment}
        order = json.dumps({"environment": own, "arguments": list(arguments), "agent": os.getpid()}).encode()
        here, child_end = socket.socketpair()
        here.settimeout(FORK_S)
        try:
            with here:
                adopt_descendants(True)
                try:
                    with child_end:
                        socket.send_fds(self._control, [order], [log, page, child_end.fileno()])
                    pid = int(here.recv(CONTROL_BYTES))
                finally:
                    adopt_descendants(False)
                # The rank waits for this message; it exits if the connection closes instead.
                here.sendall(b"go")
            return pid
        except (OSError, ValueError) as error:
            self.ready, self.over = False, True
            raise TemplateFailed(str(error)) from error

    def close(self) -> None:
        """End the template; ranks that were forked from it continue."""
        self._control.close()
        self._process.kill()
        self._process.wait()


class Templates:
    """The template of an agent, created on first use and replaced when ranks need another module or environment."""

    def __init__(self) -> None:
        self._template: Template | None = None
        self._off = False

    def of(self, module: str, environment: Mapping[str, str]) -> Template | None:
        """The template for a rank, which may not be ready yet; None if the rank must start as a new process."""
        if self._off or not can_fork(module, environment):
            return None
        if self._template is not None and not self._template.fits(module, environment):
            self.close()
        if self._template is None:
            try:
                self._template = Template(module, environment)
            except OSError:
                self.give_up()
                return None
        self._template.look()
        if self._template.over:
            self.give_up()
        return self._template

    def give_up(self) -> None:
        """Start all ranks as new processes from now on."""
        self._off = True
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process id of the template; empty if there is no template."""
        return () if self._template is None else (self._template.pid,)

    def close(self) -> None:
        """End the template."""
        if self._template is not None:
            self._template.close()
            self._template = None


def _shared(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in OWN_VARIABLES}


def main() -> int:
    """Serve the agent until it closes the socket. In a forked rank, run the rank and return its exit code."""
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    module = importlib.import_module(sys.argv[1])
    for name in _IMPORTED_TOO:
        importlib.import_module(name)
    # NumPy's OpenBLAS has started a thread pool. It ends the pool before a fork and starts it again when needed.
    _fork_and_leave()
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, CONTROL_BYTES, 3)
        if not message or len(os.listdir("/proc/self/task")) != 1:
            return 0 if not message else 1
        sys.stdout.flush()
        sys.stderr.flush()
        if _fork_for_agent():
            control.close()
            _become_rank(module.__name__, json.loads(message), *descriptors)
            return int(module.main())
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_and_leave() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _fork_for_agent() -> bool:
    """Fork twice; returns True in the rank, the grandchild, and False in the template.

    The process in between exits at once, so the agent adopts the rank as its child.
    """
    middle = os.fork()
    if middle == 0:
        if os.fork():
            os._exit(0)
        return True
    os.waitpid(middle, 0)
    return False


def _become_rank(module: str, order: dict[str, Any], log: int, page: int, talk: int) -> None:
    os.setsid()
    deadline = time.monotonic() + FORK_S
    while os.getppid() != order["agent"]:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0005)
    bind_to_parent(order["agent"])
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.close(log)
    own = {**order["environment"], variables.PAGE: str(page)}
    os.environ.pop(variables.TEMPLATE_ROOM, None)
    os.environ.update(own)
    _show(module, order["arguments"], own)
    sys.argv = [str(sys.modules[module].__file__), *order["arguments"]]
    # Seed the global generators again: as in separate processes, they must differ between ranks.
    if (numpy_random := sys.modules.get("numpy.random")) is not None:
        numpy_random.seed()
    sys.modules["torch"].random.default_generator.seed()
    with socket.socket(fileno=talk) as agent:
        agent.sendall(b"%d" % os.getpid())
        if agent.recv(2) != b"go":
            os._exit(1)


def _show(module: str, arguments: Sequence[str], own: Mapping[str, str]) -> None:
    """Write the rank's command line and its own variables to the memory that /proc shows.

    Only the module name, the arguments and the reserved variable are overwritten, because a library may have kept a
    pointer to any other variable.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    argv_start, argv_end, env_start, env_end = (int(field) for field in fields[45:49])
    name = b"bigtrain.jobs.template\0"
    line = ctypes.string_at(argv_start, argv_end - argv_start)
    at = line.find(name)
    if at >= 0:
        text = b"\0".join(map(os.fsencode, (module, *arguments)))
        _write(argv_start + at, argv_end - argv_start - at, text)
    room = f"{variables.TEMPLATE_ROOM}=".encode()
    at = ctypes.string_at(env_start, env_end - env_start).find(room)
    if at >= 0:
        text = b"\0".join(os.fsencode(f"{name}={value}") for name, value in own.items())
        _write(env_start + at, len(room) + ROOM_BYTES, text)


def _write(address: int, size: int, text: bytes) -> None:
    ctypes.memset(address, 0, size)
    ctypes.memmove(address, text, min(len(text), size - 1))


if __name__ == "__main__":
    sys.exit(main())
