"""The controller: runs in the process of the command and restarts the ranks within a budget; independent of Ray."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from bigtrain import variables
from bigtrain.jobs.causes import Fault, Kind, RetryBudget
from bigtrain.jobs.generation import Generation, GenerationOutcome, Launch
from bigtrain.jobs.membership import Membership
from bigtrain.jobs.placing import PlacementCancelled, PlacementFailed, PlacementRefused, Placer
from bigtrain.jobs.protocol import AgentConnection, PeerLost, ProtocolError, keep_alive
from bigtrain.run import ExitCode, names
from bigtrain.signals import STOP_SIGNALS, on_hangup, on_signals

if TYPE_CHECKING:
    from bigtrain.jobs.config import JobConfig

SAME_SIGNAL_S: Final = 0.1
"""Two signals within this many seconds count as one request: `timeout` and some shells send a signal to a process and
again to its process group."""
LOOK_S: Final = 0.1


class EventWriter(Protocol):
    """A function that writes one event to the run's events.jsonl."""

    def __call__(self, event: str, /, **fields: Any) -> None: ...


class StopSwitch:
    """Counts the requests to stop a run: level 0 is none, 1 is save and exit, 2 is end at once."""

    def __init__(self) -> None:
        self.level = 0
        self._asked_at = 0.0

    def press(self) -> bool:
        """Raise the level by one, up to 2; returns whether the level changed."""
        now = time.monotonic()
        if self.level >= 2 or (self.level == 1 and now - self._asked_at < SAME_SIGNAL_S):
            return False
        self.level += 1
        self._asked_at = now
        return True

    def press_first(self) -> None:
        """Request a stop, unless one was requested before."""
        if self.level == 0:
            self.press()


def saved_step(run_directory: Path) -> int:
    """The step that checkpoints/LATEST names, or 0 if no checkpoint is published."""
    try:
        text = (run_directory / names.CHECKPOINTS / names.LATEST).read_text()
    except (OSError, UnicodeDecodeError):
        return 0
    found = re.search(r"step_(\d+)", text)
    return int(found.group(1)) if found else 0


def next_attempt(run_directory: Path) -> int:
    """The first attempt number for which the run directory holds no logs yet."""
    found = (path.name for path in (run_directory / names.LOGS).glob("attempt_*"))
    return 1 + max((int(name[8:]) for name in found if name[8:].isdigit()), default=-1)


class Controller:
    """Runs all ranks until the run ends, and restarts them after a fault.

    The run is finished if all ranks exit with 0, and stopped on request if they exit with 75. If a rank exits with 2,
    the run ends with a user error. Anything else is a fault: all ranks are ended and started again on the same agents,
    with a new attempt number and master port, as long as the retry budget allows it (`RetryBudget`). The placer
    starts new agents only if an agent was lost or if the run moves to other nodes (`Membership`). Before a move the
    ranks save and exit, so that no step is lost.

    SIGINT or SIGTERM requests the ranks to save and exit; a second signal ends them at once. SIGHUP, which the kernel
    sends when the terminal closes, also requests the ranks to save and exit, except under nohup.

    Args:
        run_directory_path: The run directory, which holds logs and checkpoints.
        placer: Provides the nodes.
        job: The run's `job` section.
        run_name: The run's name in printed lines.
        on_event: Writes the events fault, restarted, stopped, finished and failed, with fields such as attempt, cause,
            rank, host and step.
        say: Prints one line for the user.
        launch: The module, arguments and limits of the ranks.
        environment: Variables for the ranks; BIGTRAIN_RUN and BIGTRAIN_ATTEMPT are added.
        progress: Returns the step of the newest checkpoint; by default the step that checkpoints/LATEST names.
        first_attempt: Number of the first attempt; by default the first number without logs.
    """

    def __init__(
        self,
        run_directory_path: Path,
        placer: Placer,
        job: JobConfig,
        run_name: str,
        on_event: EventWriter,
        *,
        say: Callable[[str], None],
        launch: Launch,
        environment: dict[str, str] | None = None,
        progress: Callable[[], int] | None = None,
        first_attempt: int | None = None,
    ) -> None:
        self._path = run_directory_path
        self._placer = placer
        self._run_name = run_name
        self._event = on_event
        self._say = say
        self._launch = launch
        self._environment = dict(environment or {})
        self._progress = progress or (lambda: saved_step(run_directory_path))
        self._attempt = next_attempt(run_directory_path) if first_attempt is None else first_attempt
        self._budget = RetryBudget(job.max_failures, self._progress, launch.reports_steps)
        self._membership = Membership(placer, lambda line: say(f"{run_name}: {line}"), self._record)
        self._switch = StopSwitch()
        self._announced = 0
        self._generation = 0
        self._agents: list[AgentConnection] = []

    def request_stop(self) -> None:
        """Request the run to stop, as Ctrl-C does: the first call saves and exits, the second ends the ranks at once.

        Any thread or signal handler may call this method.
        """
        self._switch.press()

    def request_save_and_stop(self) -> None:
        """Request the run to save and stop, unless it is stopping already. Any thread or signal handler may call it."""
        self._switch.press_first()

    def run(self) -> int:
        """Run to the end; returns the exit code: 0 finished, 1 failed, 2 user error, 75 stopped."""
        # A shell may send SIGHUP twice when its terminal closes: the second is not a second request.
        with on_signals(self.request_stop, *STOP_SIGNALS), on_hangup(self.request_save_and_stop):
            try:
                return self._run()
            finally:
                self._release()

    def _run(self) -> int:
        while True:
            if not self._agents:
                code = self._place()
                if code is not None:
                    return code
            outcome = self._live(self._agents)
            cause = self._moves(outcome)
            if cause is None:
                code = self._conclude(outcome)
                if code is not None:
                    return code
                assert outcome.fault is not None
                cause = outcome.fault.cause
            if self._stop_level() > 0:
                return self._stopped(outcome.step)
            self._attempt += 1
            self._record("restarted", cause=cause)
            place = f", from step {self._progress()}" if self._launch.reports_steps else ""
            self._say(f"{self._run_name}: restarting, attempt {self._attempt}{place}")

    def _place(self) -> int | None:
        """Get agents from the placer. Returns the run's exit code if there are none, otherwise None."""
        try:
            self._agents = self._placer.place(lambda: self._stop_level() > 0)
        except PlacementCancelled:
            return self._stopped(0)
        except PlacementRefused as error:
            self._failed(str(error))
            return ExitCode.USER
        except PlacementFailed as error:
            return self._failed(f"no ranks could be started: {error}")
        self._membership.placed()
        return None

    def _release(self) -> None:
        self._placer.release()
        self._agents = []

    def _ask(self) -> int:
        """What the ranks should do: 0 continue, 1 save and exit, 2 end at once."""
        level = self._stop_level()
        if level == 0 and self._membership.reason_to_leave() is not None:
            return 1
        return level

    def _moves(self, outcome: GenerationOutcome) -> str | None:
        """Why the run moves to other nodes; None unless the ranks have saved and exited for a move."""
        reason = self._membership.reason_to_leave()
        if reason is None or outcome.fault is not None or ExitCode.STOPPED not in outcome.codes.values():
            return None
        if self._stop_level() == 0:
            self._release()
            return reason
        return None

    def _live(self, agents: list[AgentConnection]) -> GenerationOutcome:
        self._generation += 1
        environment = self._environment | {
            variables.RUN: str(self._path),
            variables.ATTEMPT: str(self._attempt),
        }
        logs = str(self._path / names.LOGS / f"attempt_{self._attempt}")
        return Generation(
            self._generation,
            agents,
            self._launch,
            environment,
            logs,
            self._ask,
            self._on_notice,
        ).live()

    def _stop_level(self) -> int:
        """The level of the stop switch. A new level is printed here, once, because a signal handler must not print."""
        level = self._switch.level
        if level > self._announced:
            self._announced = level
            if level == 1:
                grace_s = self._launch.stop_grace_s
                how = "save and exit" if grace_s is None else f"get SIGTERM, and SIGKILL after {grace_s:g} s"
                self._say(f"stopping {self._run_name}: its ranks {how}; Ctrl-C again ends them at once")
            else:
                self._say(f"ending the ranks of {self._run_name} at once")
        return level

    def _record(self, event: str, **fields: Any) -> None:
        try:
            self._event(event, attempt=self._attempt, **fields)
        except OSError as error:  # A full disk must not end a run whose ranks train.
            self._say(f"{self._run_name}: the event '{event}' could not be recorded: {error}")

    def _on_notice(self, agent: AgentConnection) -> None:
        if self._membership.elastic:
            self._membership.on_agent_notice(agent)
            return
        self._say(f"{self._run_name}: host {agent.host} was requested to stop")
        self.request_save_and_stop()

    def _conclude(self, outcome: GenerationOutcome) -> int | None:
        """The exit code if the run is over; None if the ranks must be restarted."""
        if outcome.fault is not None:
            fault, anew = self._membership.judge(outcome.fault, outcome.lost)
            outcome.fault = fault
            self._record(
                "fault",
                cause=fault.cause,
                rank=fault.rank,
                host=fault.host,
                step=fault.step,
                kind=fault.kind.value,
                silent_s=fault.silent_s,
            )
            self._say(f"{self._run_name}: {fault.cause}")
            if fault.kind is Kind.USER or self._stop_level() == 0:
                verdict = self._budget.judge(fault)
                if not verdict.retry:
                    return self._give_up(fault, verdict.reason)
                if anew:
                    self._release()
                return None if self._wait(verdict.delay_s) else self._stopped(outcome.step)
        elif not outcome.killed:
            if ExitCode.STOPPED in outcome.codes.values():
                return self._stopped(outcome.step)
            self._record("finished", step=outcome.step)
            return ExitCode.FINISHED
        # A stop was requested, and the ranks did not finish saving.
        if not self._launch.reports_steps:
            return self._stopped(outcome.step, self._kill_cause(outcome))
        saved = self._progress()
        if saved > 0:
            self._say(f"{self._run_name}: the steps after step {saved} are lost")
            return self._stopped(outcome.step)
        return self._failed("the run was ended before its first checkpoint")

    def _kill_cause(self, outcome: GenerationOutcome) -> str | None:
        """Why the ranks of a user's own script were killed after a request to stop; None if they were not."""
        if outcome.overdue:
            return f"ranks did not end within {self._launch.stop_grace_s:g} s of SIGTERM and were killed"
        return "ranks were killed on request" if outcome.killed else None

    def _stopped(self, step: int, cause: str | None = None) -> int:
        if cause is None:
            self._record("stopped", step=step)
        else:
            self._record("stopped", step=step, cause=cause)
            self._say(f"{self._run_name}: {cause}")
        again = "resumes it" if self._launch.reports_steps else "starts it again"
        self._say(f"{self._run_name}: stopped; the same command {again}")
        return ExitCode.STOPPED

    def _failed(self, reason: str) -> int:
        self._record("failed", cause=reason)
        self._say(f"{self._run_name}: failed: {reason}")
        return ExitCode.FAILED

    def _give_up(self, fault: Fault, reason: str) -> int:
        evidence = fault.traceback or fault.tail
        if evidence.strip():
            self._say(evidence.rstrip())
        if fault.kind is Kind.USER:
            self._record("failed", cause=fault.cause)
            return ExitCode.USER
        self._say(f"{self._run_name}: logs of its ranks: {self._path / names.LOGS / f'attempt_{self._attempt}'}")
        return self._failed(f"{reason}: {fault.cause}")

    def _wait(self, delay_s: float) -> bool:
        """Wait before a restart and keep the agents connected; returns whether the run should still continue."""
        if delay_s:
            self._say(f"{self._run_name}: waiting {delay_s:g} s before the next attempt")
        deadline = time.monotonic() + delay_s
        while self._stop_level() == 0 and (remaining := deadline - time.monotonic()) > 0:
            try:
                keep_alive(self._agents, min(LOOK_S, remaining))
            except (PeerLost, ProtocolError):
                self._release()
        return self._stop_level() == 0
