"""Time and memory of `bigtrain data overlap` on 100 MB of training text: `python -m tests.bench.bench_overlap`.

The text is the source of Python's library and of the packages beside it: 100 MB to train on, the 4 MB after them held
out. The result goes to tests/bench/results/bench_overlap.txt.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "tests" / "bench" / "results" / "bench_overlap.txt"
TRAIN_BYTES, HELD_OUT_BYTES = 100_000_000, 4_000_000


def main() -> None:
    """Write the texts, compare them in a process of its own, and print what that took."""
    library = Path(sysconfig.get_paths()["stdlib"])
    with tempfile.TemporaryDirectory() as place:
        files = {"train.txt": TRAIN_BYTES, "held-out.txt": HELD_OUT_BYTES}
        sources = iter(sorted(library.rglob("*.py")))
        for name, size in files.items():
            with open(Path(place) / name, "wb") as out:
                while out.tell() < size:
                    out.write(next(sources).read_bytes().decode("utf-8", "ignore").encode())
        command = [sys.executable, "-m", "bigtrain", "data", "overlap", *files, "--json"]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=place, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        seconds = time.monotonic() - began
    found = json.loads(done.stdout)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    text = (
        f"python -m tests.bench.bench_overlap, {os.cpu_count()} cores\n"
        f"{TRAIN_BYTES / 1e6:.0f} MB of training text, {HELD_OUT_BYTES / 1e6:.0f} MB held out: {seconds:.0f} s, "
        f"peak memory {peak:.2f} GiB; {found['passages']:,} passages, {found['share']:.1%} of them found\n"
    )
    RESULTS.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
