"""Scripts for deepspeed, whose launcher passes `--local_rank=N` as the first argument."""

from __future__ import annotations

import re
from dataclasses import replace

from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.jobs.scripts.launcher import LAUNCHERS, ScriptLauncher, refuse_options

_NO_LOCAL_RANK = ("--no_local_rank", "--no-local-rank")
_MODULE = ("--module", "-m")


@LAUNCHERS.register
class Deepspeed(ScriptLauncher):
    """Replaces `deepspeed SCRIPT ARGS`."""

    name = "deepspeed"
    used_by = re.compile(r"^\s*(import|from) deepspeed\b.*?--local_rank\b", re.MULTILINE | re.DOTALL)

    def adapt(self, call: ScriptCall, options: list[str], nodes: int, procs: int) -> ScriptCall:
        """See `ScriptLauncher`."""
        rest = [option for option in options if option not in (*_NO_LOCAL_RANK, *_MODULE)]
        fix = "Write --nodes and --procs-per-node in place of deepspeed's own options; hosts are the cluster's."
        refuse_options(self.name, rest, fix)
        return replace(
            call,
            local_rank_argument=not any(option in _NO_LOCAL_RANK for option in options),
            module=call.module or any(option in _MODULE for option in options),
        )
