"""Checks `engine.passthrough` against the settings that the engine's library accepts, before any rank is started.

Only DeepSpeed and Accelerate know their settings. Importing them takes seconds and imports torch, so the check runs in
a separate process, and only if `engine.passthrough` is not empty.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from bigtrain.children import module_command, with_source
from bigtrain.config import UserError
from bigtrain.config.plugin import plugin_environment, plugin_of_launcher
from bigtrain.engines.config import ENGINES, EngineConfig, Passthrough, Precision

TIMEOUT_S = 120


def check_passthrough_apart(engine: EngineConfig, precision: Precision, *, pipelined: bool) -> None:
    """Let the engine's library parse its settings, in a separate process.

    Raises:
        UserError: The library refuses the settings, or cannot be imported.
    """
    if not isinstance(engine, Passthrough) or not engine.passthrough:
        return
    question = {"engine": engine.model_dump(mode="json"), "precision": precision, "pipelined": pipelined}
    asked = subprocess.run(
        module_command("bigtrain.engines.passthrough"), env=with_source({**os.environ, **plugin_environment()}),
        input=json.dumps(question), capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    # The library may have printed other lines first.
    last = (asked.stdout.strip().splitlines() or [""])[-1]
    if asked.returncode == UserError.exit_code:
        raise UserError(*json.loads(last))
    if asked.returncode != 0:
        cause = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"engine.passthrough cannot be checked for {engine.name}: {cause}", "engine.passthrough")


def _main() -> int:
    question = json.load(sys.stdin)
    # This registers the user's own engines.
    plugin_of_launcher()
    engine = ENGINES.read(question["engine"])
    assert isinstance(engine, Passthrough)
    try:
        engine.read_passthrough(question["precision"], pipelined=question["pipelined"])
    except UserError as error:
        print(json.dumps([error.what, error.where, error.fix]))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
