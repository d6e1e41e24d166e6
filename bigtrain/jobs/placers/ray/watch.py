"""What Ray knows of a cluster's nodes, looked at in the background: a head that is gone must not block anyone."""

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
"""After this long without an answer the head counts as silent."""


@dataclass(frozen=True)
class View:
    """A cluster at one moment."""

    taken_at: float
    """time.monotonic of the look."""

    nodes: tuple[Node, ...]
    """The living ones."""

    draining: dict[str, float | None]
    """Seconds from `taken_at` until each draining node goes; None where it has no deadline."""

    kinds: tuple[NodeKind, ...] | None
    """What the autoscaler can bring; None where there is none."""

    @property
    def stale(self) -> bool:
        """Whether the head has not answered since."""
        return time.monotonic() - self.taken_at > STALE_S


class ClusterWatch:
    """Keeps the latest view of the cluster that this process is connected to (`ray.init` is the caller's)."""

    def __init__(self) -> None:
        self._view: View | None = None
        self._unproven: dict[str, Any] = {}
        """Nodes that must show that they live, each with the task that was sent there."""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Look from now on; a second start does nothing."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(self._ended,), name="cluster-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more; does not wait for a look under way."""
        self._ended.set()
        self._thread = None

    def view(self) -> View | None:
        """The latest view; None before the first."""
        return self._view

    def distrust(self, node: str) -> None:
        """Send a task to a node; until that has come back, the node counts as unproven."""
        self._unproven.setdefault(node, None)

    def unproven(self) -> list[str]:
        """Nodes that have not shown yet that they live."""
        return list(self._unproven)

    def _prove(self, living: Collection[str]) -> None:
        """Send tasks to nodes that are unproven, and strike off those whose task is back, or that are gone for good."""
        import ray
        from ray.exceptions import RayError

        for node, task in list(self._unproven.items()):
            if node not in living:
                # The machine comes back under another name; a task left waiting would ask the autoscaler for a node.
                if task is not None:
                    ray.cancel(task)
                del self._unproven[node]
            elif task is None:
                here = {ray._raylet.RAY_NODE_ID_KEY: node}
                self._unproven[node] = (
                    ray.remote(_answer).options(num_cpus=0, max_retries=0, label_selector=here).remote()
                )
            elif ray.wait([task], timeout=0)[0]:
                self._unproven[node] = None  # Where it failed, another is sent.
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
                # The view grows stale; a placer that waits reports it.
                logger.debug("the cluster's head does not answer: %s", error)
            # On a large cluster a look takes time: spend a twentieth of a core on it at most.
            ended.wait(max(LOOK_EVERY_S, 20 * (time.monotonic() - before)))


def _answer() -> bool:
    return True


def look() -> View:
    """Ask the cluster's head for its nodes; blocks as long as that does not answer."""
    import ray

    # The public API has neither a node's free resources nor its draining.
    state = ray._private.state.state
    now = time.monotonic()
    free = state.available_resources_per_node()
    # A deadline is a time of the head's clock, in ms; 0 where there is none.
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
    """The kinds of node that an autoscaler's config names."""
    if config is None or not config.node_group_configs:
        return None
    return tuple(
        NodeKind(UNLIMITED if group.max_count < 0 else group.max_count, dict(group.resources))
        for group in config.node_group_configs
    )
