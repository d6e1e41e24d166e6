"""Measures how well an order shuffles, compared with a full permutation of the same sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.data.order.sample_order import IntArray, Order, permutation

MAX_SEQUENCES = 1 << 22
"""Maximum number of sequences that are measured."""


@dataclass(frozen=True)
class Mixing:
    """How far sequences that are neighbours in a shard are spread over the training."""

    travel_median: float
    """Distance of two neighbours in the order of training, in sequences: the median over all pairs."""
    travel_10th: float
    """The same distance: the 10th percentile over all pairs."""
    same_batch: float
    """Share of the pairs of neighbours that are in the same batch."""
    shards_per_batch: float
    """Mean number of distinct shards per batch."""
    source_deviation: float
    """Standard deviation, over batches, of the number of sequences of a source; the maximum over all sources."""


@dataclass(frozen=True)
class ShuffleQuality:
    """The measurement of an order, and of a full permutation of the same sequences."""

    sequences: int
    batch: int
    window: int
    measured: Mixing
    permutation: Mixing


def shuffle_quality(order: Order, batch: int, source_of_shard: Sequence[int] = (), start: int = 0) -> ShuffleQuality:
    """Measure an order over as many sequences as one epoch has, but at most MAX_SEQUENCES.

    Args:
        batch: Sequences per step.
        source_of_shard: The source of each shard, if there are several sources.
        start: The first position that is measured.
    """
    count = min(int(order.counts.sum()), MAX_SEQUENCES)
    draw = order.take(start, count)
    firsts = np.cumsum(order.counts) - order.counts
    # Epochs are kept apart, so that only sequences of the same pass over a source are neighbours.
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
    """The measurement as a text table."""
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
