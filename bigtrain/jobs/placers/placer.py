"""What the controller asks of whatever gives it machines: this one, Ray, or Slurm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from bigtrain import variables
from bigtrain.children import with_source
from bigtrain.jobs.protocol import AgentConnection


class PlacementCancelled(Exception):
    """The run was asked to stop while it waited for machines."""


class PlacementFailed(Exception):
    """No agent could be started; the text says why."""


class PlacementRefused(PlacementFailed):
    """No waiting would help: the machines cannot ever carry the run as it is configured."""


class Notice(NamedTuple):
    """A machine of the present placement will be taken away."""

    agent: str
    host: str
    seconds: float | None
    """Time until then; None where it is not known."""


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
            PlacementRefused: The machines cannot ever carry the run.
        """
        ...

    def release(self) -> None:
        """End all agents with everything that they started, also those that no longer answer. Idempotent."""
        ...


@runtime_checkable
class ElasticPlacer(Placer, Protocol):
    """A placer whose machines come and go. Nodes are named by `AgentConnection.agent`; no call blocks."""

    def distrust(self, agent: str) -> None:
        """The node's agent was lost: it must show that it lives before it is taken again."""
        ...

    def exclude(self, agent: str) -> bool:
        """Leave the node out from now on; False where the run could not go on without it."""
        ...

    def leave(self, agent: str) -> None:
        """The node will be taken away, as it says itself: it is not taken again."""
        ...

    def notices(self) -> list[Notice]:
        """The nodes of the present placement of which the cluster says so; they are not taken again."""
        ...

    def larger(self) -> int:
        """How many nodes a placement would have now, where that is more than the present one has, else 0."""
        ...


def agent_environment(inherited: Mapping[str, str], address: str, token: str, mark: str) -> dict[str, str]:
    """The environment of an agent: where its controller is, what proves it, and the mark of all that it starts."""
    # The agent must run the controller's code, also where that is a checkout and not installed.
    own = {variables.CONTROLLER: address, variables.JOB_TOKEN: token, variables.PLACEMENT: mark}
    return with_source(inherited) | own
