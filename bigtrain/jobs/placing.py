"""The interface of placers, which provide a run's nodes: this machine, a Ray cluster, a Slurm allocation or others."""

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
    """The run was requested to stop while it waited for nodes."""


class PlacementFailed(Exception):
    """No agent could be started; the text says why."""


class PlacementRefused(PlacementFailed):
    """The available nodes can never run the job as it is configured, so waiting does not help."""


class Notice(NamedTuple):
    """The report that a node of the current placement will be taken away."""

    agent: str
    """Name of the node's agent."""
    host: str
    seconds: float | None
    """Seconds until the node is taken away; None if not known."""


@dataclass(frozen=True)
class PlacementRequest:
    """The arguments from which a placer is built."""

    job: JobConfig
    logs: Path
    """The run's log directory, which all nodes must share."""
    say: Callable[[str], None]
    """Prints one line for the user."""
    procs: int
    """Ranks on each node."""
    sizes: Sequence[int]
    """Numbers of nodes that the run's layout allows."""
    paths: Sequence[Path] = ()
    """Files and directories that each node must be able to read before ranks are started."""
    on_event: Callable[..., None] = lambda event, /, **fields: None
    """Writes the events `waiting` and `placed` to the run's events.jsonl."""


class Placer:
    """Starts one agent on each node and removes the agents again; the controller starts the ranks.

    This class is an extension point: `job.placer` selects a class by its `name`, if the class is registered in
    `bigtrain.jobs.placer_kinds.PLACERS`. A placer must implement `place`, `release`, `of` and `procs`. The defaults of
    the other methods suit a fixed set of nodes.
    """

    name: ClassVar[str]
    elastic: bool = False
    """Whether nodes may be added and taken away during a run. If so, the placer also implements `distrust`, `exclude`,
    `leave`, `notices` and `larger`, which must not block and which name nodes by `AgentConnection.agent`."""

    @classmethod
    def of(cls, request: PlacementRequest) -> Placer:
        """Build the placer of one run."""
        raise NotImplementedError

    @classmethod
    def is_here(cls) -> bool:
        """Whether this process runs inside an allocation of this kind, so that `job.placer: auto` selects it."""
        return False

    @classmethod
    def procs(cls, job: JobConfig) -> int:
        """Number of ranks that `job` starts on each node.

        Raises:
            UserError: The job needs more nodes than there can be.
        """
        raise NotImplementedError

    @classmethod
    def run(cls, controller: Controller, run_name: str, say: Callable[[str], None]) -> int:
        """Run the controller to its end. A placer overrides this method to handle the signals of its scheduler.

        Returns:
            A value of ExitCode.
        """
        return controller.run()

    def place(self, cancelled: Callable[[], bool]) -> list[AgentConnection]:
        """Start agents and wait until all have connected.

        Args:
            cancelled: Called several times a second while waiting; returns whether to give up.

        Returns:
            One connection for each node, in the order of node ranks. The same nodes always have the same order.

        Raises:
            PlacementCancelled: `cancelled` returned True.
            PlacementFailed: An agent did not start.
            PlacementRefused: The nodes can never run the job.
        """
        raise NotImplementedError

    def release(self) -> None:
        """End all agents and everything that they started, including agents that no longer answer. Idempotent."""
        raise NotImplementedError

    def distrust(self, agent: str) -> None:
        """Do not use the node, whose agent was lost, until it has shown that it is alive."""

    def exclude(self, agent: str) -> bool:
        """Never use the node again; returns False, without effect, if the run cannot continue without it."""
        return False

    def leave(self, agent: str) -> None:
        """Never use the node again, because its machine reported that it will be taken away."""

    def notices(self) -> list[Notice]:
        """The nodes of the current placement that the cluster will take away; they are not used again."""
        return []

    def larger(self) -> int:
        """Number of nodes of the largest possible placement, if that is more than the current one has; else 0."""
        return 0


def agent_environment(inherited: Mapping[str, str], address: str, token: str, mark: str) -> dict[str, str]:
    """The environment variables of an agent.

    Args:
        inherited: The variables to start from.
        address: The controller's address as "HOST:PORT".
        token: The run's token.
        mark: A value that marks the agent and all its descendants (see `bigtrain.variables.PLACEMENT`).
    """
    # The agent must run the controller's code, even if that is a checkout that is not installed.
    own = {variables.CONTROLLER: address, variables.JOB_TOKEN: token, variables.PLACEMENT: mark}
    return with_source(inherited) | own
