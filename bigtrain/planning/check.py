"""Whether a run can fit the memory of its devices, before any process is started."""

from __future__ import annotations

from typing import Any

from bigtrain.config import UserError
from bigtrain.hardware.cluster import Cluster, known_clusters
from bigtrain.hardware.devices import lookup
from bigtrain.planning.estimate import Job
from bigtrain.planning.search import ADVICE


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


def entry_of(device_name: str) -> Cluster | None:
    """The entry whose device a driver reports under this name."""
    device = lookup(device_name)
    return None if device is None else next((one for one in known_clusters() if one.device.name == device.name), None)
