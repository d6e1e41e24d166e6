"""The faults of a soak. Each causes damage, repairs what the run cannot, and is reported by an event.

A fault's function returns what it did in a few words and a pattern of the cause that the run must name; "" where
nothing is to be seen, since the run has to bear it without a word.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bigtrain.run import ExitCode
from tests.bench.soak_run import RANKS, Soaked
from tests.data import faulty_server
from tests.training.test_resume import flip_a_bit

SPOILT_S: Final = (1.0, 3.0)
"""How long a server fails after its first bad answer: for longer than a step may take, waiting for data is a hang."""
HOUR_S: Final = 3600
SHARD_OF_CHECKPOINT_BYTES: Final = 500_000
"""Less than a rank writes of a checkpoint, more than any other file that it writes."""

LAUNCHER_ENDED: Final = "the launcher, process {} on .* ended without releasing its lease"

Struck = tuple[str, str, str]
"""What was done; the event that tells it, and a pattern of its cause ("", "" where none has to)."""
Fault = Callable[[Soaked, random.Random], Struck]


def truncate(file: Path) -> None:
    """Leave half of it."""
    os.truncate(file, file.stat().st_size // 2)


def kill_a_rank(run: Soaked, chance: random.Random) -> Struck:
    rank = chance.randrange(RANKS)
    _send(run, rank, signal.SIGKILL)
    return f"rank {rank}", "fault", f"rank {rank} on host .* was killed by SIGKILL"


def kill_a_rank_in_a_save(run: Soaked, chance: random.Random) -> Struck:
    run.wait_for_save()
    return kill_a_rank(run, chance)


def stop_a_rank(run: Soaked, chance: random.Random) -> Struck:
    """Once it takes steps: a start may be silent for minutes."""
    rank = chance.randrange(RANKS)
    run.wait_for_steps()
    _send(run, rank, signal.SIGSTOP)
    return f"rank {rank}", "fault", f"rank {rank} on host .* hangs in phase"


def stop_a_rank_in_a_save(run: Soaked, chance: random.Random) -> Struck:
    rank = chance.randrange(RANKS)
    run.wait_for_steps()
    run.wait_for_save()
    _send(run, rank, signal.SIGSTOP)
    return f"rank {rank}", "fault", f"rank {rank} on host .* hangs in phase"


def kill_the_launcher(run: Soaked, chance: random.Random) -> Struck:
    """Whenever it is; the next one tells of it where it held the run's lease, so had begun to do something."""
    pid = run.process.pid
    held = run.holds_lease()
    run.kill_launcher()
    run.start()
    if not held:
        return "before it had the run, and start it again", "", ""
    return "and start it again", "fault", LAUNCHER_ENDED.format(pid)


def kill_the_agent(run: Soaked, chance: random.Random) -> Struck:
    run.until(run.pids)
    os.kill(run.agent(), signal.SIGKILL)
    return "", "fault", "the agent on host .* is lost"


def stop_the_agent(run: Soaked, chance: random.Random) -> Struck:
    run.until(run.pids)
    os.kill(run.agent(), signal.SIGSTOP)
    return "", "fault", "the agent on host .* is lost"


def ask_it_to_stop(run: Soaked, chance: random.Random) -> Struck:
    """And start it again. A launcher that still reads its config would end at once, and have nothing to tell."""
    run.until(run.pids)
    code = run.stop()
    if code != ExitCode.STOPPED:
        raise RuntimeError(f"asked to stop, it exited with {code} and not with {ExitCode.STOPPED.value}")
    run.start()
    return "exit code 75, and start it again", "stopped", ""


def spoil_the_server(run: Soaked, chance: random.Random) -> Struck:
    """Every answer for some seconds; what it answers soundly before and after must not show it."""
    kinds = {
        "500": faulty_server.status(500),
        "stall": faulty_server.stall(2.5),
        "reset": faulty_server.reset,
        "truncate": faulty_server.truncated,
        "other bytes": faulty_server.other_bytes,
        "half the length": faulty_server.wrong_length,
    }
    run.wait_for_steps()
    name = chance.choice(sorted(kinds))
    before = sum(run.server.requests.values())
    # Fetched bytes that are others are an error of the data after three arrivals: so only once a file.
    spoilt: set[str] = set()

    def answer(handler: faulty_server.Handler, data: bytes, start: int) -> None:
        first = handler.path not in spoilt
        spoilt.add(handler.path)
        (kinds[name] if first or name not in ("other bytes", "half the length") else faulty_server.sound)(
            handler, data, start
        )

    # From an empty cache, so that something is requested; what the run fetches meanwhile stays.
    shutil.rmtree(run.place.path / "cache", ignore_errors=True)
    run.server.always = answer
    run.until(lambda: sum(run.server.requests.values()) > before)
    time.sleep(chance.uniform(*SPOILT_S))
    run.server.always = None
    return f"{name}, {sum(run.server.requests.values()) - before} answers", "", ""


def remove_the_cache(run: Soaked, chance: random.Random) -> Struck:
    run.wait_for_steps()
    shutil.rmtree(run.place.path / "cache", ignore_errors=True)
    return "while the run uses it", "", ""


def damage_the_cache(run: Soaked, chance: random.Random) -> Struck:
    """While nobody has it mapped: what a disk does to bytes that are in use, no check on opening can see."""
    pid, damage = run.process.pid, chance.choice((flip_a_bit, truncate))
    run.until(run.holds_lease)
    run.kill_launcher()
    files = [path for path in (run.place.path / "cache").rglob("shard-*") if path.stat().st_size]
    for path in files:
        damage(path)
    run.start()
    done = f"{damage.__name__}: {len(files)} files, with the launcher killed"
    return done, "fault", LAUNCHER_ENDED.format(pid)


def damage_the_newest_checkpoint(run: Soaked, chance: random.Random) -> Struck:
    """With the launcher down; the one before must be there to fall back to."""
    damage = chance.choice((flip_a_bit, truncate, Path.unlink))
    run.until(lambda: run.holds_lease() and len(run.checkpoints()) > 2)
    run.kill_launcher()
    # A start says both: that its predecessor is dead, and which checkpoint it cannot trust.
    newest = run.checkpoints()[-1]
    damage(chance.choice(sorted(newest.glob("*.distcp"))))
    run.start()
    return f"{damage.__name__}, {newest.name}", "fallback", f"step {int(newest.name[5:])} is damaged"


def fill_the_disk(run: Soaked, chance: random.Random) -> Struck:
    """As far as one rank's checkpoint goes: no file of its may grow beyond half of what it writes of one."""
    run.wait_for_steps()
    failed = len(run.events("save_failed"))
    pid = run.pid(1)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (SHARD_OF_CHECKPOINT_BYTES, hard))
    run.until(lambda: len(run.events("save_failed")) > failed or not Path(f"/proc/{pid}").exists())
    with contextlib.suppress(OSError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    return "for one save of rank 1", "save_failed", "File too large"


def move_the_clock(run: Soaked, chance: random.Random) -> Struck:
    """An hour on or back; the next move brings it to another."""
    assert run.place.clock is not None
    with open(run.place.clock[1], "r+b") as file:
        (now,) = struct.unpack("q", file.read())
        then = chance.choice([hours * HOUR_S for hours in (-1, 0, 1) if hours * HOUR_S != now])
        file.seek(0)
        file.write(struct.pack("q", then))
    return f"from {now:+d} s to {then:+d} s", "", ""


def _send(run: Soaked, rank: int, number: int) -> None:
    """A signal to a rank, as soon as there is one."""
    os.kill(run.until(run.pids)[rank], number)


KILLS: Final[dict[Fault, int]] = {kill_a_rank: 20, kill_the_launcher: 1}
"""Fault case 34: how often each fault occurs in one round."""

ALL: Final[dict[Fault, int]] = {
    kill_a_rank: 2, kill_a_rank_in_a_save: 2, stop_a_rank: 1, stop_a_rank_in_a_save: 1, kill_the_launcher: 1,
    kill_the_agent: 1, stop_the_agent: 1, ask_it_to_stop: 1, spoil_the_server: 3, remove_the_cache: 1,
    damage_the_cache: 1, damage_the_newest_checkpoint: 1, fill_the_disk: 1, move_the_clock: 1,
}  # fmt: skip
"""Every kind that one machine can have."""
