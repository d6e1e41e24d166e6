"""`bigtrain stop --now` on a cluster: finds the driver of a submission on this machine and sends it SIGTERM twice.

A graceful stop uses Ray Jobs, which sends only one signal. This file is submitted as text, so it uses only the
standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

BETWEEN_SIGNALS_S = 0.2


def find_driver(submission: str) -> int | None:
    """A pidfd of the driver process of a submission, or None if there is no such process."""
    mark = f"BIGTRAIN_SUBMISSION={submission}".encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(int(pid))
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"bigtrain.jobs.cluster.driver" in words and mark in Path(f"/proc/{pid}/environ").read_bytes().split(
                b"\0"
            ):
                return descriptor
            os.close(descriptor)
    return None


def main() -> int:
    """Send the signals; returns 0, or 1 if the driver does not run any more."""
    descriptor = find_driver(sys.argv[1])
    if descriptor is None:
        return 1
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        time.sleep(BETWEEN_SIGNALS_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
