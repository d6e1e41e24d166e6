"""Peak memory of a save above the state's, in MiB: of the first, which allocates what is kept, and of the next.

Arguments: directory, "synchronous" or "asynchronous", "whole" tensors or "views" into one storage, as FSDP and ZeRO
make them. The state takes 64 MiB, in tensors of 16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.checkpoint.saver import Saver

TENSORS, ELEMENTS = 4, 1 << 22


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(directory: str, kind: str, layout: str) -> None:
    saver = Saver(Path(directory), CheckpointConfig(asynchronous=kind == "asynchronous"))
    facts = {"progress": {}, "config_hash": "c", "identity": "i"}
    # What a first save imports and a first tensor allocates is not what a save needs.
    saver.save(1, {"model.warm": torch.ones(10)}, **facts)
    saver.wait()
    flat = torch.randn(TENSORS * ELEMENTS + 1)
    state = {f"model.{index}": part for index, part in enumerate(flat[1:].split(ELEMENTS))}
    if layout == "whole":
        state = {name: part.clone() for name, part in state.items()}
    found = []
    for step in (2, 3):
        before = resident_bytes()
        # Sets the peak to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        saver.save(step, state, **facts)
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.status == "saved", outcome.cause
        found.append((peak_bytes() - before) / 2**20)
    saver.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
