"""Scripts for torchrun, which get only torchrun's variables, as every script does."""

from __future__ import annotations

from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.jobs.scripts.launcher import LAUNCHERS, ScriptLauncher, refuse_options


@LAUNCHERS.register
class Torchrun(ScriptLauncher):
    """Replaces `torchrun SCRIPT ARGS`."""

    name = "torchrun"

    def adapt(self, call: ScriptCall, options: list[str], nodes: int, procs: int) -> ScriptCall:
        """See `ScriptLauncher`."""
        fix = "Write --nodes, --procs-per-node, --module and job.max_failures=N in place of torchrun's own options."
        refuse_options(self.name, options, fix)
        return call
