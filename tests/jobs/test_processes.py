"""Which processes are ended together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from bigtrain import variables
from bigtrain.jobs.processes import end_marked

FAMILY = """
import os, pathlib, subprocess, sys, time
# One that has lost the mark, in a session of its own, as a process that overwrites its environment for its title.
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], env={}, start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(100)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(place: Path, mark: str) -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen([sys.executable, "-c", FAMILY, str(place)], env=os.environ | {variables.CLUSTER: mark})
    while not (place.exists() and place.read_text()):
        time.sleep(0.01)
    return process, int(place.read_text())


def test_descendants_that_lost_the_mark_are_ended_with_those_that_carry_it(tmp_path: Path) -> None:
    mine, grandchild = start(tmp_path / "mine", "cafe")
    other, stranger = start(tmp_path / "other", "beef")
    try:
        assert end_marked("cafe", variable=variables.CLUSTER) >= 2
        mine.wait(10)
        deadline = time.monotonic() + 10
        while alive(grandchild):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert other.poll() is None
        assert alive(stranger)
        assert end_marked("cafe", variable=variables.CLUSTER) == 0
    finally:
        end_marked("beef", variable=variables.CLUSTER)
        other.wait(10)


def test_what_is_spared_keeps_its_children(tmp_path: Path) -> None:
    process, grandchild = start(tmp_path / "mine", "feed")
    try:
        assert end_marked("feed", spare=[process.pid], variable=variables.CLUSTER) == 0
        assert alive(grandchild)
    finally:
        end_marked("feed", variable=variables.CLUSTER)
        process.wait(10)
