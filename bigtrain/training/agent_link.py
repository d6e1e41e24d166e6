"""Connects a rank's loop with its agent, through the heartbeat page and SIGTERM."""

from __future__ import annotations

import time

from bigtrain.heartbeat import Control, Heartbeat, Phase, StopRequest
from bigtrain.training.loop import VOTE_SAVE, VOTE_STOP


class AgentLink:
    """The loop's connection to its agent: it sends heartbeats and receives requests to stop or to save."""

    def __init__(self, heartbeat: Heartbeat, stop: StopRequest, save_every_s: float | None) -> None:
        self._heartbeat = heartbeat
        self._stop = stop
        self._save_every_s = save_every_s
        self._next_save = time.monotonic() + save_every_s if save_every_s else None
        self._answered = Control.RUN

    def beat(self, step: int, phase: Phase) -> None:
        """Send a heartbeat to the agent."""
        self._heartbeat.beat(step, phase)

    def vote(self) -> float:
        """This rank's vote. A save that the agent requests, or that is due by the clock, is voted for once."""
        control = self._heartbeat.control()
        saves = control is Control.SAVE and self._answered is not Control.SAVE
        self._answered = control
        if self._next_save is not None and time.monotonic() >= self._next_save:
            saves = True
            self._next_save = time.monotonic() + (self._save_every_s or 0.0)
        stops = control is Control.STOP or self._stop.requested
        return VOTE_STOP * stops + VOTE_SAVE * saves
