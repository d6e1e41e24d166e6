"""Scripts for accelerate, whose launcher sets ACCELERATE_* and other variables from its options and config file."""

from __future__ import annotations

import os
import re
from argparse import ArgumentError, ArgumentParser, Namespace
from dataclasses import replace
from typing import Final

from bigtrain.config import UserError
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.jobs.scripts.launcher import LAUNCHERS, ScriptLauncher

_OWN_VARIABLES: Final = frozenset({
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT",
    "PYTHONPATH", "CUDA_VISIBLE_DEVICES",
})  # fmt: skip
"""Variables that bigtrain or the node sets, so accelerate's values are not used."""


@LAUNCHERS.register
class Accelerate(ScriptLauncher):
    """Replaces `accelerate launch OPTIONS SCRIPT ARGS`; uses the config file that accelerate finds on this machine."""

    name = "accelerate"
    used_by = re.compile(r"^\s*(import|from) accelerate\b", re.MULTILINE)

    def adapt(self, call: ScriptCall, options: list[str], nodes: int, procs: int) -> ScriptCall:
        """See `ScriptLauncher`."""
        options = options[1:] if options[:1] == ["launch"] else options
        found = _variables(options, nodes, procs)
        return replace(call, environment={**found, **call.environment})


def _variables(options: list[str], nodes: int, procs: int) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a script, computed by accelerate's own functions."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    where = [f"--num_processes={nodes * procs}", f"--num_machines={nodes}", "--machine_rank=0"]
    where += ["--main_process_ip=127.0.0.1", "--main_process_port=0"]
    try:
        args, defaults, precision_of_file = _validate_launch_command(
            _parse(launch_command_parser(), [*options, *where, "script.py"])
        )
        # The same choice as in accelerate's launch_command.
        if args.use_deepspeed and not args.cpu:
            fields = list(defaults.deepspeed_config) if defaults else []
            fields += ["mixed_precision"] if precision_of_file else []
            args.deepspeed_fields_from_accelerate_config = ",".join(fields)
            _, environment = prepare_deepspeed_cmd_env(args)
        elif (args.use_fsdp or args.use_megatron_lm or args.multi_gpu) and not args.cpu:
            environment = prepare_multi_gpu_env(args)
        else:
            # bigtrain starts the processes; with one machine, accelerate does not require mpirun.
            args.num_machines = 1
            _, environment = prepare_simple_launcher_cmd_env(args)
    except (ValueError, RuntimeError, OSError, ArgumentError) as error:
        raise UserError(f"accelerate refuses its options: {error}", "--launcher") from None
    return {
        name: value
        for name, value in environment.items()
        if os.environ.get(name) != value and name not in _OWN_VARIABLES
    }


def _parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    def refuse(message: str) -> None:
        raise ValueError(message)

    parser.error = refuse  # type: ignore[assignment,method-assign]
    return parser.parse_args(words)
