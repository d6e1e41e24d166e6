"""How long it takes to detect faults and recover from them, and what they cost: `make bench-faults`.

    python -m tests.bench.bench_faults [--faults 10] [--only ranks|stops|nodes|fewer|trackers]

    P1         SIGKILL of one of two ranks          -> seen
    P2         SIGSTOP of one of two ranks          -> seen, beyond its limit (5 s)
    P3 killed  SIGKILL of a node's raylet (Ray)     -> seen
    P3 silent  SIGSTOP of a raylet and its agent    -> seen
    P4         each of these                        -> steps done again
               a stop, a drain, growth by a node    -> none
    P7         each of these, and each run's end    -> processes, ports, shared memory, temporary files left
    P8         W&B hangs, is away, has a full disk  -> a step's time over that of a step without W&B
    P10 rank   SIGKILL of a rank                    -> next step, restarted in place
    P10 node   SIGKILL of a node's raylet           -> next step, on another node
    P10 fewer  the same with no other node          -> next step, on two nodes instead of three

Each is done --faults times to runs of real ranks, at random moments between two saves; what says "node",
on real Ray nodes of this machine. Each line gives the median and the extremes, and where a time has parts, the median
of each. It exits with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
from tests.bench.faults.left import go_apart
from tests.bench.faults.measured import PROMISES, Measured, table
from tests.bench.faults.nodes import bench_fewer, bench_nodes
from tests.bench.faults.ranks import bench_ranks, bench_stops
from tests.bench.faults.trackers import bench_trackers

BENCHES = {
    "ranks": bench_ranks,
    "stops": bench_stops,
    "nodes": bench_nodes,
    "fewer": bench_fewer,
    "trackers": bench_trackers,
}


def main() -> int:
    """Measure, print, and say by the exit code whether the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10, help="faults of each kind")
    parser.add_argument("--only", choices=BENCHES, help="faults of one place")
    parser.add_argument("--json", action="store_true", help="print all values as one object")
    arguments = parser.parse_args()
    go_apart("tests.bench.bench_faults", sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # So that runs and nodes end with this.
    results = {promise: Measured() for promise in PROMISES}
    with tempfile.TemporaryDirectory(prefix="bigtrain-bench-") as directory:
        place = Path(directory)
        library = Path(os.__file__).parent
        pack([library / "abc.py", library / "heapq.py"], place / "shards", Tokenizer.open("bytes"), validation="10%")
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch_s = time.monotonic() - began
        load = os.getloadavg()[0]
        for name, bench in BENCHES.items():
            if arguments.only in (None, name):
                bench(place, arguments.faults, results)
    lines, kept = table(results)
    if arguments.json:
        print(json.dumps({name: vars(measured) for name, measured in results.items()} | {"import_torch_s": torch_s}))
    else:
        cores = len(os.sched_getaffinity(0))
        here = f"importing torch takes {torch_s:.2f} s here; {cores} cores, load {load:.2f} before the first fault"
        print("\n".join([*lines, here]))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
