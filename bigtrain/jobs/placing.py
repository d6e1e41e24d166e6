"""Where a run's machines come from: this one, a Ray cluster, a Slurm allocation, or what a plugin brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from bigtrain import variables
from bigtrain.children import with_source
from bigtrain.jobs.protocol import AgentConnection

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig
    from bigtrain.jobs.controller import Controller


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


@dataclass(frozen=True)
class PlacementRequest:
    """What a placer is made from."""

    job: JobConfig
    logs: Path
    """The run's directory of logs; on several nodes they share it."""
    say: Callable[[str], None]
    """Prints one line for a person."""
    procs: int
    """Ranks on each node."""
    sizes: Sequence[int]
    """Numbers of nodes at which the run can be laid out."""
    paths: Sequence[Path] = ()
    """Files and directories that each node must see before ranks are started."""
    on_event: Callable[..., None] = lambda event, /, **fields: None
    """Writes `waiting` and `placed` into the run's record."""


class Placer:
    """Starts one agent a node and takes them away again; ranks are the controller's business.

    An extension point: a class with a `name`, registered in `bigtrain.jobs.placer_kinds.PLACERS`, is chosen by
    `job.placer`. `place`, `release`, `of` and `procs` must be written. The rest has defaults, for machines that neither
    come nor go.
    """

    name: ClassVar[str]
    elastic: bool = False
    """Whether machines come and go. Nodes are named by `AgentConnection.agent`; the methods for it must not block."""

    @classmethod
    def of(cls, request: PlacementRequest) -> Placer:
        """The placer of one run."""
        raise NotImplementedError

    @classmethod
    def is_here(cls) -> bool:
        """Whether a command that is started here runs inside this kind's own allocation, and so uses it by itself."""
        return False

    @classmethod
    def procs(cls, job: JobConfig) -> int:
        """How many ranks `job` puts on each node.

        Raises:
            UserError: It takes more nodes than there can be.
        """
        raise NotImplementedError

    @classmethod
    def run(cls, controller: Controller, run_name: str, say: Callable[[str], None]) -> int:
        """Run the controller to its end; here signals of a scheduler are handled.

        Returns:
            A code of ExitCode.
        """
        return controller.run()

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start agents and wait until all have connected.

        Args:
            cancelled: Asked several times a second while waiting.

        Returns:
            One connection a node, in the order of node ranks: the same nodes always come in the same order.

        Raises:
            PlacementCancelled: `cancelled` returned True.
            PlacementFailed: An agent did not start.
            PlacementRefused: The machines cannot ever carry the run.
        """
        raise NotImplementedError

    def release(self) -> None:
        """End all agents with everything that they started, also those that no longer answer. Idempotent."""
        raise NotImplementedError

    def distrust(self, agent: str) -> None:
        """The node's agent was lost: it must show that it lives before it is taken again."""

    def exclude(self, agent: str) -> bool:
        """Do not use the node from now on; False if the run cannot go on without it."""
        return False

    def leave(self, agent: str) -> None:
        """The node itself reports that it will be taken away: it is not taken again."""

    def notices(self) -> list[Notice]:
        """The nodes of the present placement that the cluster will take away; they are not taken again."""
        return []

    def larger(self) -> int:
        """How many nodes a placement would have now, if that is more than the present one has, else 0."""
        return 0


def agent_environment(inherited: Mapping[str, str], address: str, token: str, mark: str) -> dict[str, str]:
    """The environment of an agent: where its controller is, what proves it, and the mark of all that it starts."""
    # The agent must run the controller's code, also where that is a checkout and not installed.
    own = {variables.CONTROLLER: address, variables.JOB_TOKEN: token, variables.PLACEMENT: mark}
    return with_source(inherited) | own
