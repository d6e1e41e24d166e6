"""Stand-ins for Slurm's srun, scontrol and sinfo, and for the part of slurmctld that signals and requeues.

There is no Slurm on a test machine: these scripts do of its work what bigtrain relies on, with local processes as
the nodes' tasks. Nodes are addresses of the loopback network, so that each can be reached under its name. They show
that bigtrain asks Slurm for the right things, not that Slurm does them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SRUN = """
import json, os, signal, subprocess, sys
from pathlib import Path
state = Path(os.environ["STAND_IN_STATE"])
with open(state / "srun.jsonl", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
options, command = {}, sys.argv[1:]
while command[0].startswith("--"):
    name, _, value = command.pop(0).partition("=")
    assert value or name in ("--overlap", "--no-kill"), name
    options[name] = value
names = options["--nodelist"].split(",")
assert len(names) == int(options["--nodes"]) == int(options["--ntasks"])
down = set((state / "down").read_text().split()) if (state / "down").exists() else set()
if down & set(names):
    sys.exit("srun: error: Unable to create step: Required node not available (down, drained or reserved)")
silent = set((state / "silent").read_text().split()) if (state / "silent").exists() else set()
tasks = [
    subprocess.Popen(
        command, start_new_session=True,
        env=os.environ | {"SLURMD_NODENAME": name, "SLURM_NODEID": str(number), "SLURM_PROCID": str(number)},
    )
    for number, name in reversed(list(enumerate(names))) if name not in silent
]
def end(*_):
    for task in tasks:
        task.kill()
signal.signal(signal.SIGTERM, end)
sys.exit(max((task.wait() for task in tasks), default=1))
"""

SCONTROL = """
import os, sys
from pathlib import Path
state = Path(os.environ["STAND_IN_STATE"])
if sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join(sys.argv[3].split(",")))
elif sys.argv[1] == "requeue":
    if (state / "no_requeue").exists():
        sys.exit("Requested operation is presently disabled for job " + sys.argv[2])
    (state / "requeued").write_text(sys.argv[2])
else:
    sys.exit("unknown: " + " ".join(sys.argv))
"""

SINFO = """
import os, sys
from pathlib import Path
down = Path(os.environ["STAND_IN_STATE"]) / "down"
lost = down.read_text().split() if down.exists() else []
[names] = [argument.removeprefix("--nodes=") for argument in sys.argv if argument.startswith("--nodes=")]
for name in names.split(","):
    print(name, "down*" if name in lost else "alloc")
"""


class Slurm:
    """A cluster of stand-ins with its commands in `state`/bin."""

    def __init__(self, state: Path, nodes: int) -> None:
        self.state = state
        self.nodes = [f"127.0.0.{number}" for number in range(2, 2 + nodes)]
        bin_path = state / "bin"
        bin_path.mkdir(parents=True)
        for name, script in (("srun", SRUN), ("scontrol", SCONTROL), ("sinfo", SINFO)):
            (bin_path / name).write_text(f"#!{sys.executable}\n{script}")
            (bin_path / name).chmod(0o755)

    def environment(self, restarts: int = 0) -> dict[str, str]:
        """What Slurm exports to a batch script."""
        return {
            "PATH": f"{self.state / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STAND_IN_STATE": str(self.state),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": str(len(self.nodes)),
            "SLURM_JOB_NODELIST": ",".join(self.nodes),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }

    def sbatch(self, script: Path, *arguments: str, limit: Callable[[int], bool], cwd: Path, output: Path) -> int:
        """Run a batch script, signal it where `limit` (given the restart count) says so, and start it again if it asks.

        Returns:
            The exit code of its last run.
        """
        text = script.read_text()
        found = re.search(r"^#SBATCH --signal=B:(\w+)@\d+", text, re.MULTILINE)
        assert found, "the script requests no signal"
        assert re.search(r"^#SBATCH --requeue", text, re.MULTILINE), "the script may not be requeued"
        for restarts in range(10):
            with open(output, "ab") as log:
                process = subprocess.Popen(
                    ["bash", str(script), *arguments], cwd=cwd, stdout=log, stderr=log, start_new_session=True,
                    env=os.environ | self.environment(restarts),
                )  # fmt: skip
            signalled = False
            while process.poll() is None:
                if not signalled and limit(restarts):
                    signalled = True
                    process.send_signal(signal.Signals[f"SIG{found[1]}"])
                if (self.state / "requeued").exists():
                    break
                time.sleep(0.02)
            if not (self.state / "requeued").exists():
                return process.wait()
            (self.state / "requeued").unlink()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)  # Slurm's own end of a requeued job comes by SIGKILL, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise AssertionError("the job was requeued ten times")
