"""Estimates the duration and the price of a run, with failures and the best interval between checkpoints.

Let c be the time to save a checkpoint, and M the mean time between failures. The interval T that loses least time is
about sqrt(2 c M) (Young 1974; Daly 2006). The share of time that trains (goodput) is about 1 - c/T - (T/2 + R)/M, where
R is the time to detect a failure and restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigtrain.hardware.cluster import Cluster
from bigtrain.planning.estimate import Estimate, Job

DETECT_S, RESTART_S = 60.0, 300.0
"""Time to detect a rank that hangs or is lost, and time to restart all ranks and load the checkpoint."""
STATE_BYTES = 12
"""Bytes per parameter in a checkpoint: FP32 weight and two moments."""


@dataclass(frozen=True)
class Cost:
    """Time and price of a run."""

    goodput: float
    """Share of the time that trains, 0 to 1."""
    checkpoint_interval_s: float
    """The interval between checkpoints that loses least time; infinite without failures."""
    save_s: float
    """Time to save a checkpoint."""
    days: float
    gpu_hours: float
    usd: float | None
    """Price in US dollars; None if the price of the hardware is not known."""


def cost_of(job: Job, estimate: Estimate, on: Cluster, tokens: float) -> Cost:
    """Estimate the time and the price of training on `tokens` tokens."""
    gpus = estimate.sizes.world_size
    nodes = -(-gpus // on.per_node)
    save_s = STATE_BYTES * job.model.parameter_count(job.vocab_size) / (nodes * on.storage_bytes_per_s)
    rate = on.failures_per_device_hour * gpus / 3600
    between_s = 1 / rate if rate else math.inf
    interval_s = math.sqrt(2 * save_s * between_s) if rate else math.inf
    lost = 0.0
    if rate:
        lost = save_s / interval_s + (interval_s / 2 + DETECT_S + RESTART_S) / between_s
    goodput = max(0.0, 1 - lost)
    hours = tokens / estimate.tokens_per_s / 3600 / goodput if goodput else math.inf
    usd = None if on.price is None else hours * gpus * on.price
    return Cost(goodput, interval_s, save_s, hours / 24, hours * gpus, usd)
