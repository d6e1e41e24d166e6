"""The process of one rank: `python -m bigtrain.training.rank`, with torchrun's environment.

BIGTRAIN_RUN names the run directory, whose config.yaml is the resolved config; BIGTRAIN_ATTEMPT and BIGTRAIN_LEASE
number the attempt and the lease that the launcher holds. It exits with a code of `bigtrain.run.ExitCode`.
"""

from __future__ import annotations

import os
import sys

from bigtrain.config import UserError
from bigtrain.heartbeat import Heartbeat, install_rank_signals
from bigtrain.keys import load_secrets
from bigtrain.run import ExitCode, RunDirectory
from bigtrain.training.flight import last_collectives


def main() -> int:
    """Run this rank to its end."""
    stop = install_rank_signals(last_collectives)
    heartbeat = Heartbeat.from_environment()
    heartbeat.beat(0, "start")
    path = os.environ.get("BIGTRAIN_RUN")
    if not path:
        print("BIGTRAIN_RUN must name a run directory: start runs with `bigtrain train`", file=sys.stderr)
        return ExitCode.USER
    try:
        load_secrets(os.environ)
        from bigtrain.training.session import train_rank

        return train_rank(RunDirectory(path), heartbeat, stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # At once: torch aborts a process that is torn down in the middle of a save, and that would look like a fault.
        os._exit(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
