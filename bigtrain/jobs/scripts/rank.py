"""One rank of a user's own script: `python -m bigtrain.jobs.scripts.rank FILE ARGS`, with torchrun's environment.

The script runs unmodified, as a child process that does not communicate with the agent. This process sends heartbeats
while the script runs and is not stopped by a signal. It passes a request to stop to the script as SIGTERM. It exits
like the script, or with 75 if the script ended after a request to stop. The variable `bigtrain.variables.SCRIPT`
defines how the script is called; if it is not set, the command line does.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from bigtrain import variables
from bigtrain.config import UserError
from bigtrain.heartbeat import Control, Heartbeat
from bigtrain.jobs.processes import bound_to_parent, is_stopped
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.keys import load_secrets
from bigtrain.run import ExitCode
from bigtrain.storage.locks import lock

LOOK_S: Final = 0.1


def main() -> int:
    """Run the script to its end; returns the exit code of this rank."""
    heartbeat = Heartbeat.from_environment()
    heartbeat.beat(0, "start")
    environment = dict(os.environ)
    text = environment.pop(variables.SCRIPT, None)
    call = ScriptCall(sys.argv[1], sys.argv[2:]) if text is None else ScriptCall.parse(text)
    environment |= call.torchrun_environment(environment) | call.environment
    try:
        load_secrets(environment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    _keep_extensions(environment)
    return _run(call, environment, heartbeat)


def _run(call: ScriptCall, environment: dict[str, str], heartbeat: Heartbeat) -> int:
    bind = bound_to_parent()

    def prepare() -> None:
        bind()
        # The script gets the default handlers of these signals, as under torchrun.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    command = call.command(sys.executable, environment.get("LOCAL_RANK", "0"))
    child = subprocess.Popen(command, env=environment, cwd=call.directory, preexec_fn=prepare)
    asked = False
    while (code := child.poll()) is None:
        if not is_stopped(child.pid):
            heartbeat.beat(0, "stopping" if asked else "step")
        if not asked and heartbeat.control() is Control.STOP:
            asked = True
            child.send_signal(signal.SIGTERM)
        time.sleep(LOOK_S)
    if asked:
        return ExitCode.STOPPED
    if code == ExitCode.STOPPED:
        # The agent would take this code for an exit after a request to stop.
        print(f"error: the script exited with {code} without being asked to stop", file=sys.stderr, flush=True)
        return ExitCode.FAILED
    if code < 0:
        # End this process by the signal that ended the script, so that the agent reports that signal.
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


def _keep_extensions(environment: MutableMapping[str, str]) -> None:
    """Give the run its own directory for compiled torch extensions (as DeepSpeed's), and remove stale locks from it.

    A rank that is killed while it compiles leaves a lock file, on which every later start would wait forever. All
    ranks of earlier attempts are gone, so the first rank of an attempt removes the lock files that they left.
    """
    if "TORCH_EXTENSIONS_DIR" in environment:
        return
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(environment[variables.RUN].encode()).hexdigest()[:16]
    directory = cache / "bigtrain" / "extensions" / digest
    directory.mkdir(parents=True, exist_ok=True)
    environment["TORCH_EXTENSIONS_DIR"] = str(directory)
    with open(directory / "attempt", "a+") as seen:
        lock(seen.fileno())
        seen.seek(0)
        if seen.read() == environment[variables.ATTEMPT]:
            return
        for left in directory.rglob("lock"):
            left.unlink(missing_ok=True)
        seen.truncate(0)
        seen.write(environment[variables.ATTEMPT])


if __name__ == "__main__":
    sys.exit(main())
