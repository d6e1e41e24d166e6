"""What a run takes in the end: failures, the best interval between checkpoints, days and money.

With save cost c and mean time between failures M, the interval T that loses least is about sqrt(2 c M) (Young 1974;
Daly 2006), and the share of time that trains about 1 - c/T - (T/2 + R)/M, with R the time to notice a failure and
restart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigtrain.hardware.cluster import Cluster
from bigtrain.planning.estimate import Estimate, Job

DETECT_S, RESTART_S = 60.0, 300.0
"""To notice a rank that hangs or is lost, and to start all again and load."""
STATE_BYTES = 12
"""A checkpoint's of a parameter: FP32 weight and two moments."""


@dataclass(frozen=True)
class Cost:
    """Of a run's tokens."""

    goodput: float
    """Share of the time that trains."""
    checkpoint_interval_s: float
    save_s: float
    failures_interval_s: float
    """Mean time between unexpected interruptions."""
    days: float
    gpu_hours: float
    usd: float | None
    """None where no price is known."""


def cost_of(job: Job, estimate: Estimate, on: Cluster, tokens: float) -> Cost:
    """The time and money for a number of tokens."""
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
    return Cost(goodput, interval_s, save_s, between_s, hours / 24, hours * gpus, usd)
