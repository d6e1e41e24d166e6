"""Taking a run over from a launcher that may be dead."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from bigtrain.run import LEASE_LIFE_S, LEASE_RENEWAL_S, Lease, Leased, in_use

LOOK_S: Final = 0.2
OVERDUE_S: Final = 1.5 * LEASE_RENEWAL_S
"""A holder that has not renewed its lease for this long is either late or dead."""


def outlast(directory: Leased, say: Callable[[str], None]) -> bool:
    """Wait until a holder of the lease on another machine, which may be dead, counts as dead.

    A cluster that lost its head, or a Slurm job that is requeued, starts a run anew within the life of the lease that
    its dead launcher held. A living holder renews it: that is known after OVERDUE_S at the latest.

    Args:
        say: Called once, with what is waited for, when a renewal is overdue.

    Returns:
        Whether it has waited; then the directory may have changed.

    Raises:
        UserError: The holder lives.
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
                f"has not been heard of for {age_s:.0f} s, and counts as dead after {LEASE_LIFE_S:.0f}"
            )
        waited = True
        time.sleep(LOOK_S)
    return waited
