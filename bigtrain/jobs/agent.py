"""The node agent: starts the ranks of one machine, watches them, and ends them together.

    python -m bigtrain.jobs.agent        with BIGTRAIN_CONTROLLER and BIGTRAIN_JOB_TOKEN set

The agent decides nothing: it reports to the controller and follows its orders. Its ranks end with it, no matter
whether a message, the loss of the controller or SIGKILL ends it. The agent has one thread, because the kernel kills a
rank when the thread that started it ends. If BIGTRAIN_AGENT_PARENT is set to the id of the process that started the
agent, the agent also ends when that process ends.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Final

from bigtrain import variables
from bigtrain.heartbeat import ANSWERED, Beat, Control
from bigtrain.jobs.limits import LearnedLimits
from bigtrain.jobs.processes import (
    end_marked,
    follow_parent,
    free_port,
    interface_of,
)
from bigtrain.jobs.protocol import (
    Channel,
    Message,
    PeerLost,
    ProtocolError,
    connect,
)
from bigtrain.jobs.ranks import Placement, RankProcess, last_traceback
from bigtrain.jobs.template import Template, Templates
from bigtrain.run import ExitCode

LOOK_S: Final = 0.1
"""Time between two readings of the heartbeat pages; exits are seen at once."""
CONFIRM_S: Final = 1.0
"""How long a rank must stay silent beyond its limit before it counts as hanging. After the machine was suspended,
ranks have this time to send a heartbeat."""
STACKS_S: Final = 0.5
"""Time that ranks get to write their stacks to their logs."""
LATE_STACKS_S: Final = 2.0
"""Longest time that ranks get if none has answered yet, none is stopped, and the world size is greater than 1."""
TAIL_CHARACTERS: Final = 4000

_LEFT_CLEANLY: Final = (ExitCode.FINISHED, ExitCode.STOPPED)


class LocalRanks:
    """The ranks of one generation on this machine."""

    def __init__(
        self, placement: Placement, channel: Channel, inherited: Mapping[str, str], template: Template | None = None
    ) -> None:
        self.placement = placement
        self.generation = placement.generation
        self.ranks: list[RankProcess] = []
        self._channel = channel
        self._overdue_since: float | None = None
        self._examined = False
        self._limits = LearnedLimits(placement.limits)
        try:
            for local_rank in range(placement.procs):
                self.ranks.append(RankProcess(placement, local_rank, inherited, template))
        except BaseException:
            for rank in self.ranks:
                rank.reap()
            raise

    def beats(self) -> dict[str, Beat]:
        """The last heartbeat of each living rank, by rank."""
        return {str(rank.rank): rank.page.read() for rank in self.ranks}

    def set_control(self, control: Control) -> None:
        """Write the control word to the heartbeat page of every rank."""
        for rank in self.ranks:
            rank.page.set_control(control)

    def look(self) -> bool:
        """Report exits and hangs to the controller.

        A failed rank ends all ranks of this machine. A hang does not, because the controller compares the reports of
        all nodes first.

        Returns:
            Whether any rank is left.
        """
        failed = False
        # If several ranks have exited, report one that a signal killed first: it is the likely cause of the others.
        for rank in sorted(self.ranks, key=lambda rank: not rank.was_killed()):
            if not rank.has_exited():
                continue
            failed |= self._collect(rank, ended=False) not in _LEFT_CLEANLY
        if failed:
            self.end()
        elif not self._examined and self._hangs():
            # Sent before the examination, so that the agents of other nodes examine their ranks at the same time.
            self._channel.send("overdue", generation=self.generation)
            self.examine()
        return bool(self.ranks)

    def end(self) -> None:
        """Kill all ranks that are left, wait for them, and report the end of each.

        Ranks that had exited before are reported with `ended: false`.
        """
        for rank in [rank for rank in self.ranks if rank.has_exited()]:
            self._collect(rank, ended=False)
        for rank in self.ranks:
            rank.kill()
        for rank in list(self.ranks):
            self._collect(rank, ended=True)

    def _collect(self, rank: RankProcess, ended: bool) -> int:
        # Read the page before the rank is reaped, which frees it, and the log after, when it is complete.
        beat = rank.page.read()
        code = rank.reap()
        self.ranks.remove(rank)
        tail = rank.log_tail()
        self._channel.send(
            "exited",
            generation=self.generation,
            rank=rank.rank,
            code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            step=beat.step,
            phase=beat.phase,
            ended=ended,
            traceback=None if ended or code in _LEFT_CLEANLY else last_traceback(tail),
            tail="" if ended else tail[-TAIL_CHARACTERS:],
        )
        return code

    def _hangs(self) -> bool:
        beats = [rank.page.read() for rank in self.ranks]
        if not any(beat.age_s > self._limits.limit_s(beat.phase) for beat in beats):
            # Limits are learned only while no rank is overdue.
            for rank, beat in zip(self.ranks, beats, strict=True):
                self._limits.observe(rank.rank, beat)
            self._overdue_since = None
            return False
        now = time.monotonic()
        if self._overdue_since is None:
            self._overdue_since = now
        return now - self._overdue_since >= CONFIRM_S

    def examine(self) -> None:
        """Report the rank of this node that most likely hangs; a second call does nothing.

        That is, in this order: a rank whose process is stopped, the rank at the lowest step, a rank that cannot answer
        because it holds the GIL, the rank that is silent for the longest time.
        """
        if self._examined or not self.ranks:
            return
        self._examined = True
        states = [(rank.stopped, rank.page.read(), rank.log_size()) for rank in self.ranks]
        for rank in self.ranks:
            rank.dump_stacks()
        # On a busy machine ranks may need some time to answer. A stopped rank is identified without an answer.
        several = self.placement.world_size > 1
        patience = LATE_STACKS_S if several and not any(stopped for stopped, _, _ in states) else 0.0
        deadline = time.monotonic() + patience
        time.sleep(STACKS_S)
        words = self._written_since(states)
        while not any(ANSWERED in said for said in words) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            words = self._written_since(states)

        def order(index: int) -> tuple[bool, int, bool, float]:
            stopped, beat, _ = states[index]
            return not stopped, beat.step, ANSWERED in words[index], -beat.age_s

        culprit = min(range(len(states)), key=order)
        stopped, beat, _ = states[culprit]
        self._channel.send(
            "hung",
            generation=self.generation,
            rank=self.ranks[culprit].rank,
            step=beat.step,
            phase=beat.phase,
            age_s=beat.age_s,
            limit_s=self._limits.limit_s(beat.phase),
            stopped=stopped,
            answered=ANSWERED in words[culprit],
            stacks=words[culprit][-TAIL_CHARACTERS:],
        )

    def _written_since(self, states: list[tuple[bool, Beat, int]]) -> list[str]:
        """What each rank has written to its log since `states` was taken."""
        return [rank.log_tail(written) for rank, (_, _, written) in zip(self.ranks, states, strict=True)]


class Agent:
    """The agent's main loop: serves one controller until it sends `done` or the connection is lost."""

    def __init__(self, channel: Channel, environment: Mapping[str, str], parent: int | None = None) -> None:
        self._channel = channel
        self._environment = dict(environment)
        self._parent = parent
        self._placement_mark = self._environment.setdefault(variables.PLACEMENT, uuid.uuid4().hex)
        self._gang: LocalRanks | None = None
        self._templates = Templates()
        self._waiting: tuple[Placement, float] | None = None
        """The placement that starts once the template is ready, and the time.monotonic() at which it was ordered."""
        self._control = Control.RUN
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._exit_descriptors: list[int] = []
        self._terminated = False
        self._done = False

    def run(self) -> int:
        """Serve the controller; returns the agent's exit code: 0 after `done`, 1 if the controller was lost."""
        signal.signal(signal.SIGTERM, self._on_terminate)
        try:
            while not self._done:
                self._turn()
        except (PeerLost, ProtocolError) as error:
            print(f"agent: ending the ranks: {error}", file=sys.stderr)
            return 1
        finally:
            self._abandon()
        return 0

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True

    def _turn(self) -> None:
        ready = {key.fileobj for key, _ in self._selector.select(LOOK_S)}
        self._look_at_template()
        if self._gang is not None and not self._gang.look():
            self._finish_generation()
        if self._channel in ready:
            for message in self._channel.receive():
                self._handle(message)
        if self._terminated:
            self._terminated = False
            if self._parent is not None and os.getppid() != self._parent:
                raise PeerLost("the process that reserved this node has ended")
            self._channel.send("notice", signal=int(signal.SIGTERM))
        if self._gang is None:
            self._channel.keep_alive()
        else:
            self._channel.keep_alive(generation=self._gang.generation, ranks=self._gang.beats())

    def _handle(self, message: Message) -> None:
        match message["type"]:
            case "beat":
                pass
            case "port":
                self._channel.send("port", port=free_port())
            case "place":
                self._place(Placement.parse(message))
            case "control":
                self._control = Control(message["word"])
                if self._gang is not None:
                    self._gang.set_control(self._control)
            case "examine" if self._gang is not None and self._gang.generation == message["generation"]:
                self._gang.examine()
            case "kill" if self._gang is not None and self._gang.generation == message["generation"]:
                self._gang.end()
                self._finish_generation()
            case "kill" if self._waiting is not None and self._waiting[0].generation == message["generation"]:
                self._waiting = None
                self._channel.send("ended", generation=message["generation"])
            case "done":
                self._done = True

    def _place(self, placement: Placement) -> None:
        self._waiting = None
        if self._gang is not None:
            self._gang.end()
            self._finish_generation()
        if placement.world_size > placement.procs:
            self._choose_interface()
        self._control = Control.RUN
        self._waiting = placement, time.monotonic()
        self._look_at_template()

    def _look_at_template(self) -> None:
        """Start the waiting ranks once the template is ready, or as new processes if it cannot become ready."""
        if self._waiting is None:
            return
        placement, since = self._waiting
        template = self._templates.of(placement.module, placement.rank_environment(0, self._environment))
        if template is not None and not template.ready:
            if time.monotonic() - since < placement.limits["start"]:
                return
            self._templates.give_up()
        self._waiting = None
        self._start(placement, template)

    def _start(self, placement: Placement, template: Template | None) -> None:
        try:
            Path(placement.logs).mkdir(parents=True, exist_ok=True)
            gang = self._gang = LocalRanks(placement, self._channel, self._environment, template)
        except OSError as error:
            self._channel.send(
                "exited",
                generation=placement.generation,
                rank=placement.first_rank,
                code=1,
                signal=None,
                step=0,
                phase="start",
                ended=False,
                traceback=None,
                tail=f"the rank could not be started: {error}",
            )
            self._channel.send("ended", generation=placement.generation)
            return
        gang.set_control(self._control)
        for rank in gang.ranks:
            if rank.exit_descriptor is not None:
                self._selector.register(rank.exit_descriptor, selectors.EVENT_READ)
                self._exit_descriptors.append(rank.exit_descriptor)
        pids = {str(rank.rank): rank.pid for rank in gang.ranks}
        self._channel.send("started", generation=placement.generation, pids=pids)

    def _choose_interface(self) -> None:
        """Have gloo use the network interface that leads to the controller; by default gloo resolves the host name."""
        interface = interface_of(self._channel.own_address)
        if interface is not None:
            self._environment.setdefault("GLOO_SOCKET_IFNAME", interface)

    def _finish_generation(self) -> None:
        assert self._gang is not None
        generation, self._gang = self._gang.generation, None
        self._forget_descriptors()
        # Processes that left the ranks' process groups are found by their environment.
        end_marked(self._placement_mark, spare=(os.getpid(), *self._templates.pids))
        self._channel.send("ended", generation=generation)

    def _forget_descriptors(self) -> None:
        for descriptor in self._exit_descriptors:
            self._selector.unregister(descriptor)
        self._exit_descriptors.clear()

    def _abandon(self) -> None:
        """End everything without a report, because the controller is gone or has sent `done`."""
        if self._gang is not None:
            for rank in self._gang.ranks:
                rank.kill()
            for rank in self._gang.ranks:
                rank.reap()
            self._gang = None
        self._templates.close()
        end_marked(self._placement_mark, spare=(os.getpid(),))
        self._selector.close()
        self._channel.close()


def main() -> int:
    """Run the agent, configured by environment variables; returns its exit code."""
    environment = dict(os.environ)
    address, token = environment.pop(variables.CONTROLLER, ""), environment.pop(variables.JOB_TOKEN, "")
    parent = int(environment.pop(variables.AGENT_PARENT, "0")) or None
    if parent is not None and not follow_parent(parent):
        return 1
    if not address or not token:
        print(f"agent: needs {variables.CONTROLLER} and {variables.JOB_TOKEN} in its environment", file=sys.stderr)
        return 2
    named_by = environment.pop(variables.NODE_NAME_IN, None)
    if named_by is not None:
        name = environment.get(named_by) or socket.gethostname()
        environment[variables.PLACEMENT] = f"{environment.get(variables.PLACEMENT, '')} {name}"
    try:
        channel = connect(address, token, environment.get(variables.PLACEMENT, ""))
    except (PeerLost, ProtocolError) as error:
        print(f"agent on {socket.gethostname()}: {error}", file=sys.stderr)
        return 1
    return Agent(channel, environment, parent).run()


if __name__ == "__main__":
    sys.exit(main())
