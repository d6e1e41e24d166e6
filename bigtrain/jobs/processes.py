"""Linux system calls for ending groups of processes, for file descriptors, and for network ports and interfaces."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import random
import resource
import signal
import socket
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

from bigtrain import variables

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_SIOCGIFADDR: Final = 0x8915


def bound_to_parent() -> Callable[[], None]:
    """A `preexec_fn` that makes the kernel kill the child when the thread that started it ends, for any reason.

    The child also ignores SIGUSR1 and SIGUSR2 until it installs handlers, so that a request for stacks does not end a
    rank that is still starting.
    """
    return functools.partial(bind_to_parent, os.getpid(), ctypes.CDLL(None, use_errno=True))


def bind_to_parent(parent: int, libc: ctypes.CDLL | None = None) -> None:
    """Have the kernel kill this process when its parent ends; `bound_to_parent` runs this function in a child.

    Args:
        parent: Id of the parent process. If this process has another parent by now, it exits.
        libc: The C library, if it is already loaded.
    """
    (libc or ctypes.CDLL(None, use_errno=True)).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # The parent died before the call, so the kernel will not send the signal.
        os._exit(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def adopt_descendants(wanted: bool) -> None:
    """Set whether this process adopts descendants whose parent ends. By default, init adopts them.

    Raises:
        OSError: The system does not support this.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "descendants cannot be adopted")


def follow_parent(parent: int) -> bool:
    """Have the kernel send SIGTERM to this process when the thread that started it ends, for any reason.

    Returns:
        Whether `parent` is still the parent. If it died before the call, the kernel will not send the signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return os.getppid() == parent


def end_marked(placement: str, spare: Collection[int] = (), variable: str = variables.PLACEMENT) -> int:
    """Kill every process of this user whose environment contains the mark `placement`, and its descendants.

    Killing a process group misses a child that started its own session; such a child is found by its inherited
    environment. A process that overwrites its environment, as setproctitle does, is found by its parent.

    Args:
        placement: The mark: the value of `variable`.
        spare: Ids of processes that are not killed. This process is never killed.
        variable: Name of the environment variable.

    Returns:
        The number of killed processes.
    """
    mark = f"{variable}={placement}".encode()
    spare = {*spare, os.getpid()}
    killed = 0
    # Repeat until none is left: a process may have forked while the list was read.
    for _ in range(5):
        marked = [pid for pid in _processes() if pid not in spare and _is_marked(pid, mark)]
        if not marked:
            break
        # Children of a dead process are adopted by another one, so read the process tree before killing.
        parents = {pid: _parent(pid) for pid in _processes()}
        victims = [pid for pid in parents if pid not in spare and _descends(pid, set(marked), parents, spare)]
        opened = {pid: descriptor for pid in victims if (descriptor := _open(pid)) is not None}
        # A pidfd refers to one process for good. A process id that was reused meanwhile has another parent.
        same = {pid for pid in opened if _parent(pid) == parents[pid]}
        for pid, descriptor in opened.items():
            if pid in same:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed += 1
            os.close(descriptor)
    return killed


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _parent(pid: int) -> int:
    """The id of the process's parent, or 0 if the process is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _descends(pid: int, marked: Collection[int], parents: Mapping[int, int], spare: Collection[int]) -> bool:
    """Whether a process is marked or descends from a marked process, with no spared process in between."""
    while pid > 1 and pid not in spare:
        if pid in marked:
            return True
        pid = parents.get(pid, 0)
    return False


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (or a debugger)."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state in ("T", "t")
    return False


def signal_name(number: int) -> str:
    """The name of a signal, such as "SIGKILL" for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def allow_descriptors(count: int) -> None:
    """Raise this process's limit of open files to `count`, as far as the system allows; the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address; None if there is no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # The interface has no address.
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


PORTS = 20000, 32000
"""The range of ports of `free_port`."""


def free_port() -> int:
    """A TCP port that is free now, below the range that the kernel uses for outgoing connections.

    So no outgoing connection of another process takes the port between this call and its use.
    """
    generator = random.SystemRandom()
    for _ in range(1000):
        port = generator.randrange(*PORTS)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise OSError(f"no free TCP port between {PORTS[0]} and {PORTS[1]}")
