"""A run that a soak disturbs: started by the command that a user types, and started again by the same command."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml

from bigtrain.checkpoint.commit import list_checkpoints
from bigtrain.run import Lease, RunDirectory
from tests.bench.faults.run import ROOT, Run
from tests.bench.paced_model import PACE_VARIABLE
from tests.data.faulty_server import FaultyServer

NAME: Final = "soaked"
RANKS: Final = 2
PLUGIN: Final = Path(__file__).with_name("paced_model.py")
CACHE_BYTES: Final = 800_000
MARK_VARIABLE: Final = "BIGTRAIN_SOAK"
"""In the environment of all that the soak starts, so that nothing of it is overlooked."""
PACE_S: Final = 0.3
SAVE_EVERY: Final = 8
GONE_S: Final = 60.0
"""How long processes may outlive the launcher that was killed; on an idle machine it is a fraction of a second."""
WAIT_S: Final = 1200.0
"""How long anything is waited for: others may have the machine to themselves for a while."""


class Place:
    """A directory with data, the config, a clock to be moved and all that the soak's processes write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("tmp", "runs", "home"):
            (path / name).mkdir()
        self._pack()
        self.clock = self._clock()

    def _pack(self) -> None:
        from bigtrain.data.packing.documents import pack
        from bigtrain.data.tokenizers import Tokenizer

        library = Path(os.__file__).parent
        # 1.8 million tokens in a hundred shards: at 1024 tokens a step there is always one on its way.
        files = sorted(library.glob("[a-h]*.py"))
        pack(files, self.path / "shards", Tokenizer.open("bytes"), validation="2%", shard_bytes=1 << 15)

    def _clock(self) -> tuple[Path, Path] | None:
        """The library that moves the time of day, and the file that says how far; None without a compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            return None
        library, offset = self.path / "clock.so", self.path / "offset"
        source = ROOT / "tests" / "faults" / "clock.c"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        offset.write_bytes(struct.pack("q", 0))
        return library, offset

    def write_config(self, url: str) -> Path:
        """The run's YAML, whose data comes from a server."""
        config: dict[str, Any] = {
            "name": NAME,
            "model": {
                "arch": "paced-llama", "layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "context": 64,
                "tied": True, "dropout": 0.1,
            },
            "data": {"train": f"{url}/train", "validation": f"{url}/validation", "shuffle_window": 2},
            "batch": {"size": 16},
            "duration": "10000000 steps",
            "schedule": {"name": "constant", "warmup": "10 steps"},
            "precision": "fp32",
            "evaluation": {"every": "50 steps", "batches": 2},
            "checkpoint": {"every": f"{SAVE_EVERY} steps"},
            "streaming": {
                "log_samples": True, "cache_dir": str(self.path / "cache"), "cache": CACHE_BYTES, "timeout": "1 s",
            },
            "tracking": {"wandb": "disabled"},
            # A machine that others use is slow at times: what is no fault must not look like one.
            "job": {"max_failures": 1000, "limits": {"start": 300, "step": 15, "save": 45, "evaluation": 60}},
        }  # fmt: skip
        path = self.path / "soak.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def environment(self, **variables: str) -> dict[str, str]:
        """Of all processes of the soak: their own temporary directory and home."""
        own = {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.path / "tmp"),
            "HOME": str(self.path / "home"), MARK_VARIABLE: str(self.path),
            # torch's compile cache, which outlives the run; its default place is among temporary files.
            "TORCHINDUCTOR_CACHE_DIR": str(self.path / "home" / "inductor"),
        }  # fmt: skip
        return os.environ | own | variables


class Soaked(Run):
    """The run under way; `process` is its present launcher."""

    def __init__(self, place: Place, server: FaultyServer) -> None:
        self.place, self.server = place, server
        self.path = place.path / "runs" / NAME
        self.log = place.path / "launcher.log"
        self.config = place.write_config(server.url)
        self.launches = 0
        self._events: list[dict[str, Any]] = []
        self._read = 0
        self.start()

    def command(self, *arguments: str) -> list[str]:
        """`bigtrain train` on the soak's YAML."""
        command = [sys.executable, "-m", "bigtrain.cli", "train", str(self.config), "--plugin", str(PLUGIN)]
        return [*command, "--runs-dir", str(self.place.path / "runs"), "--nproc", str(RANKS), *arguments]

    def start(self, *arguments: str, paced: bool = True) -> None:
        """Start a launcher."""
        environment = self.place.environment(**({PACE_VARIABLE: str(PACE_S)} if paced else {}))
        if self.place.clock is not None:
            library, offset = self.place.clock
            environment |= {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(offset)}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command(*arguments), cwd=self.place.path, env=environment, stdout=log, stderr=log
            )
        self.launches += 1

    def kill_launcher(self) -> None:
        """SIGKILL, and wait until all that it had started is gone, too."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + GONE_S
        while left := marked(self.place.path):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes outlive their launcher by {GONE_S:g} s: {left}")
            time.sleep(0.02)

    def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until a condition is met; what it gave."""
        deadline = time.monotonic() + WAIT_S
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run does not go on; its launcher's exit code is {self.process.poll()}")
            time.sleep(0.01)
        return value

    def pids(self) -> list[int]:
        """Process ids of the ranks that live, by rank; of none where one is missing."""
        try:
            return [self.pid(rank) for rank in range(RANKS)]
        except RuntimeError:
            return []

    def holds_lease(self) -> bool:
        """Whether the present launcher has the run: the next one tells if it ends without a word from then on."""
        holder = Lease.holder(RunDirectory(self.path))
        return holder is not None and holder.pid == self.process.pid

    def agent(self) -> int:
        """Process id of the ranks' parent."""
        return int(Path(f"/proc/{self.pid(0)}/stat").read_text().rpartition(")")[2].split()[1])

    def checkpoints(self) -> list[Path]:
        """Published ones, oldest first."""
        return [checkpoint.path for checkpoint in list_checkpoints(self.path / "checkpoints")]

    def saves(self) -> int:
        """Checkpoints that were published so far, as the events say."""
        return len(self.events("saved"))

    def wait_for_steps(self) -> None:
        """Wait until the ranks take steps, by a save that begins and ends."""
        saves = self.saves()
        self.until(lambda: self.saves() > saves)

    def wait_for_save(self) -> None:
        """Wait until a save is under way."""
        before = self.temporary()
        self.until(lambda: self.temporary() - before)

    def temporary(self) -> set[str]:
        """Directories of saves under way, or of dead ones."""
        return {name for name in os.listdir(self.path / "checkpoints") if ".tmp-" in name and name.startswith("step_")}

    def stop(self) -> int:
        """SIGTERM, once; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def end(self) -> None:
        """End it at once, with all that it started."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def marked(place: Path) -> list[int]:
    """Living processes that a soak started."""
    mark, found = f"{MARK_VARIABLE}={place}".encode(), []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:
            continue
    return found
