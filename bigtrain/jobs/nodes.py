"""Selection of a run's nodes in a cluster: which nodes, how many, and in which order. Independent of Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

UNLIMITED: Final = -1


@dataclass(frozen=True)
class Node:
    """The current state of a cluster's node."""

    name: str
    """A unique name that never changes; if the same machine joins the cluster again, it gets another name."""

    host: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    """All resources of the node: amount by resource name, such as "CPU" or "GPU"."""

    free: Mapping[str, float]
    """Resources that are not in use."""


@dataclass(frozen=True)
class NodeKind:
    """A kind of node that an autoscaler can add to the cluster."""

    most: int
    """Largest number of nodes of this kind, or UNLIMITED."""

    total: Mapping[str, float]
    """All resources of one such node."""


@dataclass(frozen=True)
class Need:
    """The nodes that a run needs of a cluster."""

    sizes: Sequence[int]
    """Numbers of nodes with which the run is possible, largest first."""

    each: Mapping[str, float]
    """Resources that the run uses on each node."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that each node must have."""
    topology: str | None = None
    """See `JobConfig.topology`."""

    def suffices(self, resources: Mapping[str, float]) -> bool:
        """Whether these resources of one node are enough."""
        return all(resources.get(name, 0.0) >= amount for name, amount in self.each.items())

    def fits(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        """Whether one node with these resources and labels can be used by the run."""
        return self.suffices(resources) and all(labels.get(name) == value for name, value in self.labels.items())

    def __str__(self) -> str:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in self.each.items())
        labelled = "".join(f", labelled {name}={value}" for name, value in self.labels.items())
        return f"with {wanted} each{labelled}"


def choose(
    nodes: Sequence[Node], need: Need, previous: Sequence[str] = (), avoid: Collection[str] = ()
) -> list[Node] | None:
    """The nodes of the largest placement that is possible now, in the order of node ranks; None if none is possible.

    Nodes of the previous placement are used again and keep their node ranks; if the placement shrinks, they keep their
    order. New nodes have as few different values of the topology label as possible, and are ordered by
    (topology, host, name).

    Args:
        nodes: The living nodes of the cluster.
        need: What the run needs.
        previous: Names of the previous placement's nodes, in the order of node ranks.
        avoid: Names of nodes that must not be used.
    """
    free = [node for node in nodes if node.name not in avoid and need.fits(node.free, node.labels)]
    size = next((size for size in need.sizes if size <= len(free)), None)
    if size is None:
        return None
    by_name = {node.name: node for node in free}
    kept = [by_name[name] for name in previous if name in by_name][:size]
    fresh = _near(need, [node for node in free if node not in kept], kept, size - len(kept))
    if not kept:
        return fresh
    # A new node gets the node rank of a lost one. In a smaller placement the kept nodes are numbered again.
    slots: list[Node | None] = [by_name.get(name) for name in previous]
    if size < len(slots):
        slots = list(kept)
    slots += [None] * (size - len(slots))
    replacements = iter(fresh)
    return [node if node is not None else next(replacements) for node in slots]


def _near(need: Need, candidates: Sequence[Node], kept: Sequence[Node], count: int) -> list[Node]:
    """`count` of the candidates with as few different values of the topology label as possible, in order.

    Values that the kept nodes have come first, then values that many candidates have.
    """

    def value(node: Node) -> str:
        return node.labels.get(need.topology, "") if need.topology else ""

    here, there = Counter(map(value, kept)), Counter(map(value, candidates))
    by_nearness = sorted(
        candidates, key=lambda node: (-here[value(node)], -there[value(node)], value(node), node.host, node.name)
    )
    return sorted(by_nearness[:count], key=lambda node: (value(node), node.host, node.name))


@dataclass(frozen=True)
class Missing:
    """Why no placement is possible now."""

    text: str
    never: bool
    """Whether the run cannot fit even on an empty cluster with all nodes that the autoscaler can add."""


def missing(nodes: Sequence[Node], need: Need, kinds: Sequence[NodeKind] | None, avoid: Mapping[str, str]) -> Missing:
    """Explain why no placement is possible now.

    Args:
        nodes: The living nodes.
        need: What the run needs.
        kinds: The kinds of nodes that the autoscaler can add; None if there is no autoscaler.
        avoid: Reasons why nodes must not be used, by node name.
    """
    least = need.sizes[-1]
    able = [node for node in nodes if need.fits(node.total, node.labels)]
    # An autoscaler's config does not say which labels its nodes will have.
    coming = [kind for kind in kinds or () if need.suffices(kind.total)]
    reachable = len(able) if kinds is None else _most(coming, len(able))
    wanted = f"{least} {'node' if least == 1 else 'nodes'} {need}"
    if reachable != UNLIMITED and reachable < least:
        largest = {name: max((node.total.get(name, 0.0) for node in nodes), default=0.0) for name in need.each}
        having = ", ".join(f"{amount:g} {name}" for name, amount in largest.items())
        scaler = "" if kinds is None else f", and its autoscaler can provide {reachable} in all"
        return Missing(
            f"the run needs {wanted}; the cluster has {len(able)} such nodes among its {len(nodes)} (at most {having} "
            f"on one){scaler}",
            never=True,
        )
    excluded = [f"{node.host} {avoid[node.name]}" for node in able if node.name in avoid]
    busy = [node.host for node in able if node.name not in avoid and not need.fits(node.free, node.labels)]
    free = len(able) - len(excluded) - len(busy)
    reasons = [f"{', '.join(busy)} in use"] if busy else []
    reasons += excluded
    if len(able) < least:
        reasons.append(
            f"{least - len(able)} missing" if kinds is None else f"{least - len(able)} requested from the autoscaler"
        )
    return Missing(f"the run needs {wanted}, but {free} are free ({'; '.join(reasons)})", never=False)


def _most(kinds: Sequence[NodeKind], there: int) -> int:
    if any(kind.most == UNLIMITED for kind in kinds):
        return UNLIMITED
    return max(there, sum(kind.most for kind in kinds))
