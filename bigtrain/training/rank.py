"""The process of one rank: `python -m bigtrain.training.rank`, with torchrun's environment.

BIGTRAIN_RUN names the run directory, whose config.yaml is the resolved config. BIGTRAIN_ATTEMPT and BIGTRAIN_LEASE are
the numbers of the attempt and of the lease that the launcher holds. The process exits with a code of
`bigtrain.run.ExitCode`.
"""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType

from bigtrain import variables
from bigtrain.config import UserError
from bigtrain.heartbeat import Heartbeat, install_rank_signals
from bigtrain.keys import load_secrets
from bigtrain.run import ExitCode, RunDirectory
from bigtrain.training.flight import last_collectives


def main() -> int:
    """Run this rank to its end, and return its exit code."""
    stop = install_rank_signals(last_collectives)
    heartbeat = Heartbeat.from_environment()
    heartbeat.beat(0, "start")
    path = os.environ.get(variables.RUN)
    if not path:
        print("BIGTRAIN_RUN must name a run directory: start runs with `bigtrain train`", file=sys.stderr)
        return ExitCode.USER
    with _WithoutTeardown():
        load_secrets(os.environ)
        from bigtrain.training.session import train_rank

        return train_rank(RunDirectory(path), heartbeat, stop)


class _WithoutTeardown:
    """Prints an exception and then ends the process at once.

    If Python shuts down in the middle of a step or a save, torch aborts the process, which would hide the exception.
    """

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, UserError) else ExitCode.FAILED)


if __name__ == "__main__":
    sys.exit(main())
