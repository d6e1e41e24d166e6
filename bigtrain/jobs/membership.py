"""Which nodes a run should be on: some will be taken away, some have failed too often, more could be had."""

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
"""How long more nodes must have been there before the run stops to take them."""
STRIKES: Final = 2
"""Failures of one node after which it is not used any more."""

_NODE_MAY_BE_AT_FAULT: Final = (Kind.SIGNAL, Kind.HANG, Kind.AGENT_LOST)


class Membership:
    """Tells the controller when to leave a placement for another one.

    A run leaves by having its ranks save and exit, so that no step is lost and none is done twice. With a placer that
    always gives the same machines there is nothing to do.

    Args:
        placer: Gives the machines.
        say: Prints one line for a person.
        on_event: Writes `notice` and `excluded`, with host and cause.
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
        """Whether there are other machines to go to."""
        return self._placer is not None

    def placed(self) -> None:
        """Begin a new placement: notices and reasons that concern the last one are dropped."""
        self._reason = None
        self._larger_since = None
        self._notices = {}

    def reason_to_leave(self) -> str | None:
        """Why the run should go on elsewhere, or None; the same answer until the next placement."""
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
        """An agent was asked to stop by its machine: the run saves and goes on without it."""
        assert self._placer is not None
        self._placer.leave(agent.agent)
        self._take_notice(Notice(agent.agent, agent.host, None))

    def judge(self, fault: Fault, lost: list[str]) -> tuple[Fault, bool]:
        """Look at a fault from the nodes' side.

        Args:
            lost: The agents that were lost with it.

        Returns:
            The fault, as preemption where a notice had named the node; and whether to place the run again.
        """
        for agent in lost:
            if self._placer is not None:
                self._placer.distrust(agent)
        gone = next((self._notices[agent] for agent in [fault.agent, *lost] if agent in self._notices), None)
        if gone is not None:
            within = "" if gone.seconds is None else f" (its notice was of {gone.seconds:.0f} s)"
            cause = f"host {gone.host} was taken away before the run had saved{within}: {fault.cause}"
            return replace(fault, kind=Kind.PREEMPTED, cause=cause, traceback=None), True
        # Who is about to leave anyway leaves now.
        return fault, bool(lost) | self._strike(fault) | (self._reason is not None)

    def _take_notice(self, notice: Notice) -> None:
        if notice.agent in self._notices:
            return
        self._notices[notice.agent] = notice
        when = "soon" if notice.seconds is None else f"in {max(0.0, notice.seconds):.0f} s"
        self._reason = f"host {notice.host} will be taken away {when}"
        self._event("notice", host=notice.host, cause=self._reason)
        self._say(f"{self._reason}: the run saves, and goes on without it")

    def _look_for_more(self, placer: Placer, now: float) -> None:
        larger = placer.larger()
        if larger == 0:
            self._larger_since = None
        elif self._larger_since is None:
            self._larger_since = now
        elif now - self._larger_since >= GROW_AFTER_S:
            self._reason = f"{larger} nodes can be had"
            self._say(f"{self._reason}: the run saves, and goes on with them")

    def _strike(self, fault: Fault) -> bool:
        """Count a failure against its node; returns whether that node is now excluded."""
        if self._placer is None or not fault.agent or fault.kind not in _NODE_MAY_BE_AT_FAULT:
            return False
        self._strikes[fault.agent] += 1
        if self._strikes[fault.agent] < STRIKES:
            return False
        if not self._placer.exclude(fault.agent):
            self._say(f"host {fault.host} failed {self._strikes[fault.agent]} times; the run cannot do without it")
            return False
        self._event("excluded", host=fault.host, cause=f"{STRIKES} failures: {fault.cause}")
        self._say(f"host {fault.host} failed {self._strikes[fault.agent]} times: it is not used any more")
        return True
