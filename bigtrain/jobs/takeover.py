"""Taking over a run from a launcher that may be dead."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from bigtrain.run import LEASE_LIFE_S, LEASE_RENEWAL_S, Lease, Leased, in_use

LOOK_S: Final = 0.2
OVERDUE_S: Final = 1.5 * LEASE_RENEWAL_S
"""A holder that has not renewed its lease for this many seconds is either late or dead."""


def outlast(directory: Leased, say: Callable[[str], None]) -> bool:
    """Wait until the lease of a possibly dead launcher on another machine expires.

    A cluster that lost its head node, or a requeued Slurm job, restarts a run while the lease of its dead launcher is
    still valid. A holder that is alive renews the lease; this is seen after OVERDUE_S seconds at the latest.

    Args:
        directory: The directory that the lease protects.
        say: Prints one line for the user. It is called once, when a renewal is overdue, and says how long to wait.

    Returns:
        Whether the call waited. If so, the directory may have changed meanwhile.

    Raises:
        UserError: The holder is alive.
    """
    first = Lease.holder(directory)
    waited, said = False, False
    while (last := Lease.holder(directory)) is not None and last.alive():
        if last.is_here() or last != first:
            raise in_use(directory, last)
        age_s = time.time() - last.renewed
        if not said and age_s > OVERDUE_S:
            said = True
            say(
                f"waiting {LEASE_LIFE_S - age_s:.0f} s: process {last.pid} on {last.host} holds '{directory.name}', "
                f"has sent no heartbeat for {age_s:.0f} s, and counts as dead after {LEASE_LIFE_S:.0f}"
            )
        waited = True
        time.sleep(LOOK_S)
    return waited
