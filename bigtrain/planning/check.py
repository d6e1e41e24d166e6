"""Checks whether a run can fit the memory of its devices, before any process is started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from bigtrain.config import UserError
from bigtrain.hardware.cluster import Cluster, known_clusters
from bigtrain.hardware.devices import lookup
from bigtrain.planning.estimate import Job
from bigtrain.planning.search import ADVICE

ACCELERATOR: Final = "accelerator_type:"
FEWEST_OUTPUTS: Final = 256


def check_memory(config: Any, outputs: int, gpus: int, device_name: str) -> None:
    """Refuse a run that needs more than a device's full memory.

    The estimate of buffers may be off by a few per cent, so the limit is the full memory, not the usable memory. A
    model or a layout that the formulas do not cover, and an unknown device, pass.

    Args:
        config: The run's `RunConfig`.
        outputs: Number of vocabulary entries.
        gpus: Number of ranks.
        device_name: Name of the device, as its driver reports it.

    Raises:
        UserError: The run needs more memory. The error names the largest term and the keys that reduce it.
    """
    on = entry_of(device_name)
    if on is None:
        return
    try:
        job = Job.of(config, outputs)
        sizes = job.layout.mesh(gpus)
        memory, place = job.peak(sizes, job.passes(sizes), on)
    except (UserError, ValueError):
        return  # The formulas do not cover the run, or another check refuses it with the reason.
    limit = on.device.memory_bytes
    if memory.total <= limit:
        return
    term = memory.largest
    stage = f" (stage {place})" if sizes.pp > 1 else ""
    raise UserError(
        f"The run needs about {memory.total / 2**30:.0f} GiB on a rank{stage}, but {on.device.name} has "
        f"{limit / 2**30:.0f} GiB; the largest part is {term}, {getattr(memory, term) / 2**30:.1f} GiB",
        "layout",
        f"Use {ADVICE.get(term, 'a device with more memory')}. `bigtrain plan` finds an execution that fits.",
    )


def check_memory_of_nodes(config: Any, outputs: int | None, gpus: int, nodes: Iterable[Mapping[str, Any]]) -> None:
    """Run `check_memory` for the nodes of a Ray cluster, if they have accelerators of exactly one kind.

    Args:
        config: The run's `RunConfig`.
        outputs: Number of vocabulary entries; None: not known yet, so the smallest vocabulary is assumed.
        gpus: Number of ranks.
        nodes: The resources of each node by Ray's names, such as "accelerator_type:H100".

    Raises:
        UserError: The run needs more memory. The error names the largest term and the keys that reduce it.
    """
    kinds = {name.removeprefix(ACCELERATOR) for node in nodes for name in node if name.startswith(ACCELERATOR)}
    on = entry_of_accelerator(kinds.pop()) if len(kinds) == 1 else None
    if on is not None:
        check_memory(config, outputs or FEWEST_OUTPUTS, gpus, on.device.reported_as[0])


def entry_of_accelerator(kind: str) -> Cluster | None:
    """The hardware entry of an accelerator by Ray's name for it, such as "H100" or "A100-40G"; None if unknown.

    If several entries match, the one with the most memory is returned.
    """
    names = kind.casefold().removeprefix("amd-instinct-").split("-")
    found = [one for one in known_clusters() if one.device.name.casefold().split()[0] == names[0]]
    exact = [one for one in found if any(part and f"{part}b" in one.device.name.casefold() for part in names[1:])]
    return max(exact or found, key=lambda one: one.device.memory_bytes, default=None)


def entry_of(device_name: str) -> Cluster | None:
    """The hardware entry of the device that a driver reports under this name; None if unknown."""
    device = lookup(device_name)
    return None if device is None else next((one for one in known_clusters() if one.device.name == device.name), None)
