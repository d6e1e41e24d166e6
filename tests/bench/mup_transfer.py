"""Whether the best learning rate stays where the width grows: muP beside the standard parametrization.

`python -m tests.bench.mup_transfer` trains small Llamas on the bytes of Python's standard library and prints
tests/bench/results/mup_transfer.txt.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigtrain.models.config import FAMILIES
from bigtrain.models.init import initialise
from bigtrain.optim.config import OPTIMIZERS

WIDTHS, BASE = (32, 64, 128), 32
RATES = tuple(2.0**power for power in range(-9, -2))
SEEDS = (1,)
STEPS, SEQUENCES, CONTEXT, WARMUP, VOCABULARY = 100, 8, 32, 10, 256
INIT_STD = 0.1
"""Of the base width: about 1 / (2 sqrt(32)), as configs/sweeps/laptop.yaml has it for narrow models."""
LAST = 20
"""Steps whose mean loss counts."""


def text() -> torch.Tensor:
    """Bytes of a few modules of the standard library, int64."""
    library = Path(os.__file__).parent
    names = ("argparse", "ast", "datetime", "decimal", "inspect", "pickle", "subprocess", "threading", "typing")
    joined = b"".join((library / f"{name}.py").read_bytes() for name in names if (library / f"{name}.py").is_file())
    return torch.from_numpy(np.frombuffer(joined, np.uint8).astype(np.int64))


def final_loss(data: torch.Tensor, width: int, lr: float, seed: int, mup: bool) -> float:
    """Mean loss of the last steps, in nats; infinity where it diverges."""
    keys: dict[str, Any] = {"mup": {"base_width": BASE}} if mup else {}
    shape: dict[str, Any] = {
        "layers": 2,
        "width": width,
        "heads": width // 16,
        "mlp_width": 3 * width,
        "context": CONTEXT,
        "init_std": INIT_STD,
    }
    config = FAMILIES["llama"](**shape, **keys)
    model = config.build(VOCABULARY)
    initialise(model, seed)
    optimizer = OPTIMIZERS.read({"name": "adamw", "lr": lr}).build(model.named_parameters(), lr_scale=config.lr_scale)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT - 1, (SEQUENCES,), generator=generator)
        rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts.tolist()])
        batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "weights": torch.ones(SEQUENCES, CONTEXT)}
        total, weight, _ = model(batch)
        loss = total / weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Warm-up, then a straight line to zero.
        share = min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = lr * share * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    mean = sum(losses[-LAST:]) / LAST
    return mean if math.isfinite(mean) else math.inf


def main() -> None:
    """Print a table for both, and how far the best learning rate moves."""
    torch.set_num_threads(1)
    data = text()
    steps = f"{STEPS} steps of {SEQUENCES} x {CONTEXT} bytes, {len(SEEDS)} seed"
    print(f"Llamas of 2 layers, {steps}, base width {BASE}, std {INIT_STD}")
    print(f"mean loss of the last {LAST} steps, in nats a byte, by learning rate")
    for mup in (False, True):
        print(("muP" if mup else "standard").rjust(8), *(f"{lr:8.5f}" for lr in RATES), "   best (parabola)")
        for width in WIDTHS:
            found = [np.mean([final_loss(data, width, lr, seed, mup) for seed in SEEDS]) for lr in RATES]
            print(f"{width:8}", *(f"{loss:8.4f}" for loss in found), f"   {_best(found)}", flush=True)


def _best(losses: list[Any]) -> str:
    """The learning rate at the vertex of the parabola through the lowest loss and its neighbours."""
    at = int(np.argmin(losses))
    if at in (0, len(losses) - 1):
        return f"{RATES[at]:.5f}, at the edge"
    before, lowest, after = losses[at - 1 : at + 2]
    shift = 0.5 * (before - after) / (before - 2 * lowest + after) if math.isfinite(before + after) else 0.0
    return f"{RATES[at] * 2.0**shift:.5f}"


if __name__ == "__main__":
    main()
