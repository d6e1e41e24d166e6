"""The state of a Ray cluster's nodes, polled in a background thread, so that a lost head node blocks no caller."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from bigtrain.jobs.nodes import UNLIMITED, Node, NodeKind

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.5
STALE_S: Final = 10.0
"""Seconds without an answer after which the head node counts as silent."""


@dataclass(frozen=True)
class View:
    """The state of a cluster at one moment."""

    taken_at: float
    """The value of time.monotonic() at that moment."""

    nodes: tuple[Node, ...]
    """The living nodes."""

    draining: dict[str, float | None]
    """Seconds from `taken_at` until each draining node is removed, by node name; None for a node without deadline."""

    kinds: tuple[NodeKind, ...] | None
    """The kinds of nodes that the autoscaler can add; None if there is no autoscaler."""

    @property
    def stale(self) -> bool:
        """Whether the head node has not answered for STALE_S."""
        return time.monotonic() - self.taken_at > STALE_S


class ClusterWatch:
    """Keeps the latest view of the cluster that this process is connected to; the caller must call `ray.init`."""

    def __init__(self) -> None:
        self._view: View | None = None
        self._unproven: dict[str, Any] = {}
        """Nodes that must prove that they are alive, each with the task that was sent to it."""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Start to poll the cluster; a second call does nothing."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._ended,), name="cluster-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling, without waiting for a poll in progress."""
        self._ended.set()
        self._thread = None

    def view(self) -> View | None:
        """The latest view, or None before the first answer."""
        return self._view

    def distrust(self, node: str) -> None:
        """Send a task to a node; until the task has finished, the node counts as unproven."""
        self._unproven.setdefault(node, None)

    def unproven(self) -> list[str]:
        """Nodes that have not proved yet that they are alive."""
        return list(self._unproven)

    def _prove(self, living: Collection[str]) -> None:
        """Send tasks to unproven nodes. Nodes whose task has finished, and nodes that are gone, are removed."""
        import ray
        from ray.exceptions import RayError

        for node, task in list(self._unproven.items()):
            if node not in living:
                # If the machine comes back, it has another name. A pending task would request an autoscaler node.
                if task is not None:
                    ray.cancel(task)
                del self._unproven[node]
            elif task is None:
                here = {ray._raylet.RAY_NODE_ID_KEY: node}
                self._unproven[node] = (
                    ray.remote(_answer).options(num_cpus=0, max_retries=0, label_selector=here).remote()
                )
            elif ray.wait([task], timeout=0)[0]:
                self._unproven[node] = None  # If the task failed, another one is sent.
                with contextlib.suppress(RayError):
                    ray.get(task)
                    del self._unproven[node]

    def _run(self, ended: threading.Event) -> None:
        import ray
        from ray.exceptions import RayError

        while not ended.is_set() and ray.is_initialized():
            before = time.monotonic()
            try:
                self._view = view = look()
                self._prove({node.name for node in view.nodes})
            except (RayError, RuntimeError, OSError) as error:
                # The view becomes stale, and a waiting placer reports it.
                logger.debug("the cluster's head does not answer: %s", error)
            # On a large cluster a poll takes time: use at most a twentieth of a core for it.
            ended.wait(max(LOOK_EVERY_S, 20 * (time.monotonic() - before)))


def _answer() -> bool:
    return True


def look() -> View:
    """Request the state of the nodes from the cluster's head node; blocks until the head node answers."""
    import ray

    # The public API shows neither a node's free resources nor whether it is draining.
    state = ray._private.state.state
    now = time.monotonic()
    free = state.available_resources_per_node()
    # A deadline is a time in ms since the epoch, by the head node's clock; 0 means no deadline.
    draining = state.get_draining_nodes().items()
    until = {name: deadline / 1000 - time.time() if deadline else None for name, deadline in draining}
    nodes = tuple(
        Node(
            name=entry["NodeID"],
            host=entry["NodeManagerHostname"],
            labels=dict(entry.get("Labels", {})),
            total=dict(entry["Resources"]),
            free=free.get(entry["NodeID"], {}),
        )
        for entry in ray.nodes()
        if entry["Alive"]
    )
    return View(now, nodes, until, _kinds(state.get_cluster_config()))


def _kinds(config: Any) -> tuple[NodeKind, ...] | None:
    """The kinds of nodes in the autoscaler's config; None if there are none."""
    if config is None or not config.node_group_configs:
        return None
    return tuple(
        NodeKind(UNLIMITED if group.max_count < 0 else group.max_count, dict(group.resources))
        for group in config.node_group_configs
    )
