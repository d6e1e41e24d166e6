"""Estimates the time of `Collective`s from their kind, their bytes, and the nodes of their group.

Ranks are numbered with tp innermost, so a group along an axis has every `stride`-th rank. A group inside a node uses
the node's links. A group that spans nodes has the bandwidth of the network adapters of its ranks on a node, at most
that of the node's links. For an all-gather, a reduce-scatter or an all-to-all, a ring of n ranks moves (n - 1) / n of
the bytes through each link. For an all-reduce it moves twice that. The latency counts the steps of a ring or of a tree,
whichever has fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigtrain.hardware.cluster import Cluster
from bigtrain.parallel.config import Mesh
from bigtrain.planning.communication import ALL, ENDS, Collective


@dataclass(frozen=True)
class Network:
    """The links between the ranks of one layout."""

    cluster: Cluster
    sizes: Mesh

    def group(self, axes: tuple[str, ...]) -> tuple[int, int]:
        """Number of ranks in a group over some axes, and the number of them on one node."""
        if axes == ENDS:
            return 2, 1 if self.sizes.world_size > self.cluster.per_node else 2
        ranks, local, stride = 1, 1, 1
        for axis in reversed(ALL):
            size: int = getattr(self.sizes, axis)
            if axis in axes:
                ranks, local = ranks * size, local * max(1, min(size, self.cluster.per_node // stride))
            stride *= size
        return ranks, min(ranks, local)

    def seconds(self, one: Collective) -> float:
        """Seconds of one collective when nothing else uses the links."""
        ranks, local = self.group(one.axes)
        return self.ring(one.kind, one.bytes, ranks, local)

    def ring(self, kind: str, size: float, ranks: int, local: int) -> float:
        """Seconds of a collective over `ranks` ranks.

        Args:
            kind: Kind of the collective.
            size: Bytes of the full buffer; see communication.py.
            local: Number of the ranks that are on one node.
        """
        if ranks <= 1:
            return 0.0
        rates, inside, between = self.cluster.rates, self.cluster.inside, self.cluster.between
        fast = inside.bytes_per_s * rates.link
        if kind in ("send", "recv", "broadcast", "reduce", "gather", "scatter"):
            if kind == "recv":
                return 0.0  # The time is counted for the sender.
            link, bandwidth = (inside, fast) if local >= ranks else (between, between.bytes_per_s * rates.network)
            return link.latency_s + size / bandwidth
        nodes = -(-ranks // local)
        if nodes == 1:
            bandwidth, hop = fast, inside.latency_s
        else:
            bandwidth, hop = min(fast, local * between.bytes_per_s * rates.network), between.latency_s
        share = (ranks - 1) / ranks * (2 if kind == "all_reduce" else 1)
        if kind == "all_to_all" and nodes > 1:
            # Each rank sends to every other rank, through its own adapter if that is on another node.
            share, bandwidth = (ranks - local) / ranks, between.bytes_per_s * rates.network
        inner = min(local - 1, math.log2(local) * 2) * inside.latency_s if local > 1 else 0.0
        outer = min(nodes - 1, math.log2(nodes) * 2) * hop if nodes > 1 else 0.0
        steps = 2 if kind == "all_reduce" else 1
        return steps * (inner + outer) + size * share / bandwidth
