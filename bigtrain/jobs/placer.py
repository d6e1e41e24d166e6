"""What the controller asks of whatever gives it machines: this one, Ray, or Slurm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bigtrain.jobs.protocol import AgentConnection


class PlacementCancelled(Exception):
    """The run was asked to stop while it waited for machines."""


class PlacementFailed(Exception):
    """No agent could be started; the text says why."""


class Placer(Protocol):
    """Starts one agent a node and takes them away again. Ranks are none of its business."""

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start agents and wait until all have connected.

        Args:
            cancelled: Asked several times a second while waiting.

        Returns:
            One connection a node, in the order of node ranks: the same nodes always come in the same order.

        Raises:
            PlacementCancelled: `cancelled` said so.
            PlacementFailed: An agent did not start.
        """
        ...

    def release(self) -> None:
        """End all agents with everything that they started, also those that no longer answer. Idempotent."""
        ...
