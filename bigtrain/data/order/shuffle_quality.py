"""How well an order shuffles, measured against a full permutation of the same sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.data.order.sample_order import IntArray, Order, permutation

MAX_SEQUENCES = 1 << 22
"""Sequences from the start of the order that are looked at, at most."""


@dataclass(frozen=True)
class Mixing:
    """How sequences that lie together in storage are spread over the steps."""

    travel_median: float
    """Sequences between two neighbours of a shard in the order of training, in the middle of all pairs."""
    travel_10th: float
    """The same of the tenth of the pairs that stay closest."""
    same_batch: float
    """Share of neighbours that one batch holds both of."""
    shards_per_batch: float
    """Distinct shards that a batch comes from, on average."""
    source_deviation: float
    """Standard deviation, over the batches, of a source's sequences in a batch; the worst source."""


@dataclass(frozen=True)
class ShuffleQuality:
    """An order beside a full permutation of all its sequences."""

    sequences: int
    batch: int
    window: int
    measured: Mixing
    permutation: Mixing


def shuffle_quality(order: Order, batch: int, source_of_shard: Sequence[int] = (), start: int = 0) -> ShuffleQuality:
    """Measure an order over one epoch of its sequences.

    Args:
        batch: Sequences of a step.
        source_of_shard: The source of each shard, where there are several.
        start: The first position that is looked at.
    """
    count = min(int(order.counts.sum()), MAX_SEQUENCES)
    draw = order.take(start, count)
    firsts = np.cumsum(order.counts) - order.counts
    # An epoch of its own for each pass over a source, so that a neighbour is of the same pass.
    place = draw.epoch * int(order.counts.sum()) + firsts[draw.shard] + draw.sequence
    sources = np.asarray(source_of_shard or np.zeros(len(order.counts)), dtype=np.int64)
    shuffled = permutation(count, 0)
    return ShuffleQuality(
        sequences=count,
        batch=batch,
        window=order.window,
        measured=_mixing(place, draw.shard, sources[draw.shard], batch),
        permutation=_mixing(place[shuffled], draw.shard[shuffled], sources[draw.shard][shuffled], batch),
    )


def _mixing(place: IntArray, shard: IntArray, source: IntArray, batch: int) -> Mixing:
    stored = np.argsort(place, kind="stable")
    neighbours = (np.diff(place[stored]) == 1) & (shard[stored][1:] == shard[stored][:-1])
    first, second = stored[:-1][neighbours], stored[1:][neighbours]
    travelled: npt.NDArray[np.int64] = np.abs(first - second)
    whole = len(place) // batch * batch
    shards = np.sort(shard[:whole].reshape(-1, batch), axis=1)
    spread = [float((source[:whole].reshape(-1, batch) == one).sum(axis=1).std()) for one in np.unique(source).tolist()]
    return Mixing(
        travel_median=float(np.median(travelled)) if len(travelled) else 0.0,
        travel_10th=float(np.quantile(travelled, 0.1)) if len(travelled) else 0.0,
        same_batch=float((first // batch == second // batch).mean()) if len(travelled) else 0.0,
        shards_per_batch=float((np.diff(shards, axis=1) != 0).sum(axis=1).mean() + 1) if whole else 0.0,
        source_deviation=max(spread, default=0.0),
    )


def table(quality: ShuffleQuality) -> str:
    """The measurement as people read it."""
    rows = [
        ("neighbours are apart, median", "travel_median", ",.0f", " sequences"),
        ("the closest tenth of them", "travel_10th", ",.0f", " sequences"),
        ("neighbours in one batch", "same_batch", ".3%", ""),
        ("shards that a batch comes from", "shards_per_batch", ".1f", ""),
        ("a source's sequences in a batch, +-", "source_deviation", ".2f", ""),
    ]
    lines = [
        f"{quality.sequences:,} sequences, batches of {quality.batch}, window of {quality.window} shards",
        f"{'':36} {'this order':>20} {'a full permutation':>20}",
    ]
    for label, name, form, unit in rows:
        values = (format(getattr(one, name), form) + unit for one in (quality.measured, quality.permutation))
        lines.append(f"{label:36} " + " ".join(f"{value:>20}" for value in values))
    return "\n".join(lines)
