"""Decides which nodes a run uses: it leaves nodes that are taken away or fail too often, and grows to free nodes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from bigtrain.jobs.causes import Fault, Kind
from bigtrain.jobs.placing import Notice, Placer
from bigtrain.jobs.protocol import AgentConnection

LOOK_EVERY_S: Final = 0.5
GROW_AFTER_S: Final = 5.0
"""How long additional nodes must have been available before the run saves and restarts with them."""
STRIKES: Final = 2
"""Number of failures after which a node is excluded."""

_NODE_MAY_BE_AT_FAULT: Final = (Kind.SIGNAL, Kind.HANG, Kind.AGENT_LOST)


class Membership:
    """Tells the controller when to leave the current placement for another one.

    Before a run leaves a placement its ranks save and exit, so that no step is lost or repeated. With a placer that is
    not elastic, a run never leaves its placement.

    Args:
        placer: Provides the nodes.
        say: Prints one line for the user.
        on_event: Writes the events `notice` and `excluded`, with host and cause.
    """

    def __init__(self, placer: Placer, say: Callable[[str], None], on_event: Callable[..., None]) -> None:
        self._placer = placer if placer.elastic else None
        self._say = say
        self._event = on_event
        self._strikes: Counter[str] = Counter()
        self._looked_at = 0.0
        self._larger_since: float | None = None
        self._notices: dict[str, Notice] = {}
        self._reason: str | None = None

    @property
    def elastic(self) -> bool:
        """Whether the placer can provide other nodes."""
        return self._placer is not None

    def placed(self) -> None:
        """Begin a new placement, and forget the notices and the reason to leave of the last one."""
        self._reason = None
        self._larger_since = None
        self._notices = {}

    def reason_to_leave(self) -> str | None:
        """Why the run should leave its placement, or None. A reason stays until the next placement."""
        now = time.monotonic()
        if self._placer is None or self._reason is not None or now - self._looked_at < LOOK_EVERY_S:
            return self._reason
        self._looked_at = now
        for notice in self._placer.notices():
            self._take_notice(notice)
        if self._reason is None:
            self._look_for_more(self._placer, now)
        return self._reason

    def on_agent_notice(self, agent: AgentConnection) -> None:
        """Record that the machine of an agent asked it to stop: the run will save and continue without that node."""
        assert self._placer is not None
        self._placer.leave(agent.agent)
        self._take_notice(Notice(agent.agent, agent.host, None))

    def judge(self, fault: Fault, lost: list[str]) -> tuple[Fault, bool]:
        """Assign a fault to its node, and decide whether the run needs a new placement.

        Args:
            fault: The fault that ended a generation.
            lost: Names of the agents that were lost with the fault.

        Returns:
            The fault, changed to a preemption if there was a notice for its node, and whether to place the run again.
        """
        for agent in lost:
            if self._placer is not None:
                self._placer.distrust(agent)
        gone = next((self._notices[agent] for agent in [fault.agent, *lost] if agent in self._notices), None)
        if gone is not None:
            within = "" if gone.seconds is None else f" (notice period: {gone.seconds:.0f} s)"
            cause = f"host {gone.host} was preempted before the run had saved{within}: {fault.cause}"
            return replace(fault, kind=Kind.PREEMPTED, cause=cause, traceback=None), True
        # If there was a reason to leave the placement already, leave it now.
        return fault, bool(lost) | self._strike(fault) | (self._reason is not None)

    def _take_notice(self, notice: Notice) -> None:
        if notice.agent in self._notices:
            return
        self._notices[notice.agent] = notice
        when = "soon" if notice.seconds is None else f"in {max(0.0, notice.seconds):.0f} s"
        self._reason = f"host {notice.host} will be preempted {when}"
        self._event("notice", host=notice.host, cause=self._reason)
        self._say(f"{self._reason}: the run saves a checkpoint, and continues without it")

    def _look_for_more(self, placer: Placer, now: float) -> None:
        larger = placer.larger()
        if larger == 0:
            self._larger_since = None
        elif self._larger_since is None:
            self._larger_since = now
        elif now - self._larger_since >= GROW_AFTER_S:
            self._reason = f"{larger} nodes are available"
            self._say(f"{self._reason}: the run saves a checkpoint, and continues with them")

    def _strike(self, fault: Fault) -> bool:
        """Count a failure against its node; returns whether that node is now excluded."""
        if self._placer is None or not fault.agent or fault.kind not in _NODE_MAY_BE_AT_FAULT:
            return False
        self._strikes[fault.agent] += 1
        if self._strikes[fault.agent] < STRIKES:
            return False
        if not self._placer.exclude(fault.agent):
            self._say(
                f"host {fault.host} failed {self._strikes[fault.agent]} times, but the run cannot continue without it"
            )
            return False
        self._event("excluded", host=fault.host, cause=f"{STRIKES} failures: {fault.cause}")
        self._say(f"host {fault.host} failed {self._strikes[fault.agent]} times and is excluded")
        return True
