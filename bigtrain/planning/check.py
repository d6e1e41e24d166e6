"""Whether a run can fit the memory of its devices, before any process is started."""

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
    """Refuse a run that needs more than a device's whole memory; silent where the formulas or the device are not known.

    The estimate of buffers may be some per cent off, so what lies between the usable and the whole memory passes.

    Args:
        outputs: Entries of the vocabulary.
        gpus: Ranks.
        device_name: As the driver reports it.

    Raises:
        UserError: With the largest term and the key that cuts it.
    """
    on = entry_of(device_name)
    if on is None:
        return
    try:
        job = Job.of(config, outputs)
        sizes = job.layout.mesh(gpus)
        memory, place = job.peak(sizes, job.passes(sizes), on)
    except (UserError, ValueError):
        return  # not covered, or refused elsewhere with the reason
    limit = on.device.memory_bytes
    if memory.total <= limit:
        return
    term = memory.largest
    stage = f" (stage {place})" if sizes.pp > 1 else ""
    raise UserError(
        f"The run needs about {memory.total / 2**30:.0f} GiB on a rank{stage}, and {on.device.name} has "
        f"{limit / 2**30:.0f} GiB; most is {term}, {getattr(memory, term) / 2**30:.1f} GiB",
        "layout",
        f"It takes {ADVICE.get(term, 'a device with more memory')}. `bigtrain plan` finds what fits.",
    )


def check_memory_of_nodes(config: Any, outputs: int | None, gpus: int, nodes: Iterable[Mapping[str, Any]]) -> None:
    """`check_memory` on a Ray cluster's nodes; silent where they have no accelerator, or more than one kind.

    Args:
        outputs: Entries of the vocabulary; None: not known here, so that the fewest are counted.
        nodes: The resources of each, as Ray names them ("accelerator_type:H100").

    Raises:
        UserError: With the largest term and the key that cuts it.
    """
    kinds = {name.removeprefix(ACCELERATOR) for node in nodes for name in node if name.startswith(ACCELERATOR)}
    on = entry_of_accelerator(kinds.pop()) if len(kinds) == 1 else None
    if on is not None:
        check_memory(config, outputs or FEWEST_OUTPUTS, gpus, on.device.reported_as[0])


def entry_of_accelerator(kind: str) -> Cluster | None:
    """The entry of an accelerator as Ray names it ("H100", "A100-40G"): of those that may be meant, the largest."""
    names = kind.casefold().removeprefix("amd-instinct-").split("-")
    found = [one for one in known_clusters() if one.device.name.casefold().split()[0] == names[0]]
    exact = [one for one in found if any(part and f"{part}b" in one.device.name.casefold() for part in names[1:])]
    return max(exact or found, key=lambda one: one.device.memory_bytes, default=None)


def entry_of(device_name: str) -> Cluster | None:
    """The entry whose device a driver reports under this name."""
    device = lookup(device_name)
    return None if device is None else next((one for one in known_clusters() if one.device.name == device.name), None)
