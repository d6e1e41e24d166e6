"""Fuzz parsers, led by coverage: python tests/fuzz/fuzz.py [TARGET ...] [--cpu-seconds 600] [--at-once 2]

It needs atheris (pip install atheris), which no test does. Each target runs for so many seconds of processor time, or
until something is found. Inputs that reach new code are kept under --scratch, in a directory for each target: what is
worth keeping is copied to tests/fuzz/corpus/TARGET by hand, and so is a finding, once it is fixed. Prints a table;
exits 1 where there is a finding.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAMES = ("config", "index", "manifest", "metadata", "tar")
_FINDING = "finding-"
_PROGRESS = re.compile(r"^#(\d+)\s+.*\bcov: (\d+) ft: (\d+)")
_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_.-]{2,30}")


def fuzz(name: str, cpu_seconds: float, scratch: Path) -> None:
    """In a process of its own, which this ends: one target until its time is over or something is found."""
    import atheris

    with atheris.instrument_imports(include=["bigtrain", "tarfile", "yaml", "json", "targets"]):
        sys.path.insert(0, str(Path(__file__).parent))
        import targets

    words = sorted({word for data in targets.kept(name) for word in _WORD.findall(data)})
    dictionary = scratch.parent / f"{name}.words"
    dictionary.write_text("".join(f'"{word.decode()}"\n' for word in words))
    arguments = [
        f"-max_len={targets.MAX_BYTES}", "-rss_limit_mb=4096", "-timeout=300", f"-dict={dictionary}",
        f"-artifact_prefix={scratch.parent}/{_FINDING}{name}-", "-print_final_stats=1",
    ]  # fmt: skip
    end = time.process_time() + cpu_seconds

    def one(data: bytes) -> None:
        targets.run(name, data)
        if time.process_time() > end:
            # libFuzzer counts wall time alone; at a signal it prints its figures and ends.
            os.kill(os.getpid(), signal.SIGTERM)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if name in targets.STRUCTURED and chance.random() < 0.5:
            return targets.restructured(data, chance)[:longest]
        changed: bytes = atheris.Mutate(data, longest)
        return changed

    atheris.Setup([sys.argv[0], *arguments, str(scratch), str(targets.CORPUS / name)], one, custom_mutator=mutate)
    atheris.Fuzz()


def measured(name: str, cpu_seconds: float, scratch: Path) -> dict[str, Any]:
    """Run one target in a process, its output beside its inputs, and say what came of it."""
    (scratch / name).mkdir()
    log = scratch / f"{name}.log"
    with open(log, "wb") as file:
        command = [sys.executable, __file__, name, "--cpu-seconds", str(cpu_seconds), "--scratch", str(scratch)]
        process = subprocess.Popen([*command, "--alone"], stdout=file, stderr=subprocess.STDOUT)
        _, _, used = os.wait4(process.pid, 0)
    lines = log.read_text(errors="replace").splitlines()
    seen = [match for line in lines if (match := _PROGRESS.match(line))]
    if not seen:
        raise SystemExit(f"{name} did not run: see {log}")
    first, last = seen[0], seen[-1]
    executed = [int(line.split()[-1]) for line in lines if line.startswith("stat::number_of_executed_units")]
    return {
        "target": name,
        "cpu_s": used.ru_utime + used.ru_stime,
        "executions": executed[-1] if executed else int(last[1]),
        "coverage": (int(first[2]), int(last[2])),
        "features": (int(first[3]), int(last[3])),
        "new": len(list((scratch / name).iterdir())),
        "findings": len(list(scratch.glob(f"{_FINDING}{name}-*"))),
    }


def main() -> int:
    """Fuzz, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[[], *NAMES], help="all of them where none is named")
    parser.add_argument("--cpu-seconds", type=float, default=600)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="a new directory by default; its path is printed")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    scratch = given.scratch or Path(tempfile.mkdtemp(prefix="fuzz-"))
    if given.alone:
        fuzz(given.targets[0], given.cpu_seconds, scratch / given.targets[0])
        return 0
    print(f"inputs, findings and logs: {scratch}", file=sys.stderr, flush=True)
    scratch.mkdir(exist_ok=True)
    with ThreadPoolExecutor(given.at_once) as pool:
        found = list(pool.map(lambda name: measured(name, given.cpu_seconds, scratch), given.targets or NAMES))
    print(f"{'target':10}{'CPU s':>8}{'executions':>13}{'branches':>16}{'features':>16}{'inputs':>8}{'findings':>10}")
    for one in found:
        branches, features = (f"{first:,} -> {last:,}" for first, last in (one["coverage"], one["features"]))
        print(
            f"{one['target']:10}{one['cpu_s']:8.0f}{one['executions']:13,}{branches:>16}{features:>16}"
            f"{one['new']:8,}{one['findings']:10}"
        )
    return int(any(one["findings"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
