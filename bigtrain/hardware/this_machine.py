"""The hardware of this machine: accelerators, cores, memory and host name. Imports torch only on request."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

_DRIVER_INFORMATION = Path("/proc/driver/nvidia/gpus")
_NVIDIA_SMI_TIMEOUT_S = 10.0
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True)
class Machine:
    """The hardware of one host that a process sees."""

    hostname: str
    device_name: str
    """The accelerator's name as its driver reports it; without an accelerator, the processor's name."""
    n_devices: int
    """Number of visible accelerators; 0 on a machine without accelerators."""
    cores: int
    """Number of processor cores that this process may use, given its affinity and the container's quota."""
    memory_bytes: int
    """Main memory that this process may use, in bytes, given the container's limit."""


def this_machine(use_torch: bool = False) -> Machine:
    """Describe this machine.

    Args:
        use_torch: Whether torch finds the devices. torch is exact even if devices are hidden from this process or are
            not NVIDIA's, but its import takes seconds. Otherwise the driver is queried.
    """
    devices = _devices_by_torch() if use_torch else _devices_by_driver()
    return Machine(
        hostname=socket.gethostname(),
        device_name=devices[0] if devices else processor_name(),
        n_devices=len(devices),
        cores=available_cores(),
        memory_bytes=available_memory_bytes(),
    )


def _devices_by_torch() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def visible_devices(present: int) -> list[int | None]:
    """The GPUs that CUDA_VISIBLE_DEVICES lets a process see, in the order of that variable.

    As in CUDA, an empty, negative or too large index hides itself and all entries after it.

    Args:
        present: Number of GPUs of this machine.

    Returns:
        The index of each visible GPU; None for a GPU or a MIG instance that is given by its UUID.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or present == 0:
        return list(range(present))
    found: list[int | None] = []
    for entry in map(str.strip, listed.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            found.append(None)
        elif entry.isdecimal() and int(entry) < present:
            found.append(int(entry))
        else:
            break
    return found


def _devices_by_driver() -> list[str]:
    program = shutil.which("nvidia-smi")
    names = _names_by_nvidia_smi(program) if program else []
    if not names and _DRIVER_INFORMATION.is_dir():
        names = [_field(file.read_text(), "Model") for file in sorted(_DRIVER_INFORMATION.glob("*/information"))]
    # Which GPU has which UUID is not looked up: machines with different GPUs are rare.
    return [names[index or 0] for index in visible_devices(len(names))]


def _names_by_nvidia_smi(program: str) -> list[str]:
    try:
        output = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in output.splitlines() if line.strip()]


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def processor_name() -> str:
    """The processor's model as the kernel reports it, or "cpu" if the kernel does not report it."""
    try:
        return _field(Path("/proc/cpuinfo").read_text(), "model name") or "cpu"
    except OSError:
        return "cpu"


def multiplies_bf16() -> bool:
    """Whether torch has a fast BF16 matrix product on this machine's processor.

    oneDNN, which torch uses on x86, has a BF16 matrix product for processors with AVX-512 (BW, VL, DQ) or
    AVX-NE-CONVERT (`dnnl::cpu_isa` avx512_core and avx2_vnni_2). On older ones torch uses a slow loop. The result is
    True if the kernel lists no x86 flags.
    """
    try:
        flags = set(_field(Path("/proc/cpuinfo").read_text(), "flags").split())
    except OSError:
        return True
    return not flags or {"avx512bw", "avx512vl", "avx512dq"} <= flags or {"avx_vnni_int8", "avx_ne_convert"} <= flags


def _cgroup_number(path: str, field: int = 0) -> int | None:
    try:
        words = Path(path).read_text().split()
    except OSError:
        return None
    return int(words[field]) if len(words) > field and words[field].isdigit() else None


def available_cores() -> int:
    """Number of processor cores that this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_number("/sys/fs/cgroup/cpu.max", 0)
    period = _cgroup_number("/sys/fs/cgroup/cpu.max", 1)
    if quota and period:
        cores = min(cores, max(1, quota // period))
    return max(1, cores)


def available_memory_bytes() -> int:
    """Main memory that this process may use, in bytes: that of the machine, or the container's limit if lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        _cgroup_number("/sys/fs/cgroup/memory.max"),
        _cgroup_number("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ]
    return min([total, *(limit for limit in limits if limit and limit < _UNLIMITED_BYTES)])
