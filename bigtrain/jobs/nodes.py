"""Which nodes of a cluster a run takes, at which size, in which order: arithmetic that knows no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

UNLIMITED: Final = -1


@dataclass(frozen=True)
class Node:
    """A node of a cluster, as it is now."""

    name: str
    """Which it is, for good: another start of the same machine has another name."""

    host: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    """What it has."""

    free: Mapping[str, float]
    """What of it is free."""


@dataclass(frozen=True)
class NodeKind:
    """Nodes that an autoscaler can bring."""

    most: int
    """How many, or UNLIMITED."""

    total: Mapping[str, float]


@dataclass(frozen=True)
class Need:
    """What a run wants of a cluster."""

    sizes: Sequence[int]
    """Numbers of nodes at which it can run, largest first."""

    each: Mapping[str, float]
    """What it takes of each node."""

    labels: Mapping[str, str] = field(default_factory=dict)
    topology: str | None = None

    def suffices(self, resources: Mapping[str, float]) -> bool:
        """Whether these, of one node, are enough."""
        return all(resources.get(name, 0.0) >= amount for name, amount in self.each.items())

    def fits(self, resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        """Whether one node with these could carry its part of the run."""
        return self.suffices(resources) and all(labels.get(name) == value for name, value in self.labels.items())

    def __str__(self) -> str:
        wanted = " and ".join(f"{amount:g} {name}" for name, amount in self.each.items())
        labelled = "".join(f", labelled {name}={value}" for name, value in self.labels.items())
        return f"with {wanted} each{labelled}"


def choose(
    nodes: Sequence[Node], need: Need, previous: Sequence[str] = (), avoid: Collection[str] = ()
) -> list[Node] | None:
    """The nodes of the largest placement that is possible now, in the order of node ranks; None where there is none.

    Nodes of the previous placement stay and keep their place, or their order where it shrinks. New ones are taken out
    of as few values of the topology label as possible, and ordered by (topology, host, name).

    Args:
        previous: Names of the last placement's nodes, in its order.
        avoid: Names of nodes that are not to be taken.
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
    # A lost node's place goes to a new one; places past the end of a smaller placement close up.
    slots: list[Node | None] = [by_name.get(name) for name in previous]
    if size < len(slots):
        slots = list(kept)
    slots += [None] * (size - len(slots))
    replacements = iter(fresh)
    return [node if node is not None else next(replacements) for node in slots]


def _near(need: Need, candidates: Sequence[Node], kept: Sequence[Node], count: int) -> list[Node]:
    """`count` of the candidates out of as few values of the topology label as possible, in order."""

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
    """Whether the cluster, as it is and as its autoscaler may make it, could not carry the run even when empty."""


def missing(nodes: Sequence[Node], need: Need, kinds: Sequence[NodeKind] | None, avoid: Mapping[str, str]) -> Missing:
    """What a run waits for.

    Args:
        nodes: The living nodes.
        kinds: What the autoscaler can bring; None where there is none.
        avoid: Names of nodes that are not to be taken, each with the reason.
    """
    least = need.sizes[-1]
    able = [node for node in nodes if need.fits(node.total, node.labels)]
    # Which labels its nodes will carry, an autoscaler's config does not say.
    coming = [kind for kind in kinds or () if need.suffices(kind.total)]
    reachable = len(able) if kinds is None else _most(coming, len(able))
    wanted = f"{least} {'node' if least == 1 else 'nodes'} {need}"
    if reachable != UNLIMITED and reachable < least:
        largest = {name: max((node.total.get(name, 0.0) for node in nodes), default=0.0) for name in need.each}
        having = ", ".join(f"{amount:g} {name}" for name, amount in largest.items())
        scaler = "" if kinds is None else f", and its autoscaler can bring {reachable} in all"
        return Missing(
            f"it takes {wanted}; the cluster has {len(able)} such among its {len(nodes)} (at most {having} on one)"
            f"{scaler}",
            never=True,
        )
    excluded = [f"{node.host} {avoid[node.name]}" for node in able if node.name in avoid]
    busy = [node.host for node in able if node.name not in avoid and not need.fits(node.free, node.labels)]
    free = len(able) - len(excluded) - len(busy)
    reasons = [f"{', '.join(busy)} in use"] if busy else []
    reasons += excluded
    if len(able) < least:
        reasons.append(
            f"{least - len(able)} not there" if kinds is None else f"{least - len(able)} asked of the autoscaler"
        )
    return Missing(f"it takes {wanted}, and {free} are free ({'; '.join(reasons)})", never=False)


def _most(kinds: Sequence[NodeKind], there: int) -> int:
    if any(kind.most == UNLIMITED for kind in kinds):
        return UNLIMITED
    return max(there, sum(kind.most for kind in kinds))
