"""Finds the rank that the other ranks wait for, from torch's flight recorder and without a shared clock.

The recorder notes when a rank enters each collective. All ranks leave a collective together, so a rank that enters the
next one after the others has taken longer in between. The sum of these delays is how long the others waited for it.
Ranks of one machine share a clock. The clock of another machine is aligned by the median difference over all
collectives. So the method finds a rank that is late at fewer than half of the collectives, but not a machine that is
equally slow at each of them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist

from bigtrain.training.callback import Callback, Step
from bigtrain.training.flight import collectives, group_of
from bigtrain.training.progress import Progress

EVERY: Final = 100
"""Steps between two comparisons."""
LAST: Final = 200
"""Number of the newest collectives that are compared."""
SHARE: Final = 0.2
"""Share of the time that the others must have spent waiting for a rank before it is reported."""
MESSAGE_BYTES: Final = 32_768

Entered = Mapping[str, float]
"""When a rank entered each collective: "group#number" -> seconds on the clock of the rank's machine."""


def entered(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """When this rank entered the collectives among the last LAST entries of its flight recorder."""
    return {
        f"{group_of(dict(entry))}#{entry['collective_seq_id']}": entry["time_created_ns"] / 1e9
        for entry in entries[-LAST:]
        if not entry["is_p2p"]
    }


def lateness(ranks: Sequence[Entered], hosts: Sequence[str]) -> tuple[list[float], float]:
    """How long the others waited for each rank, and the time span of the comparison, both in seconds.

    Args:
        ranks: When each rank entered each collective.
        hosts: The machine of each rank.
    """
    offsets = _offsets(ranks, hosts)
    waited = [0.0] * len(ranks)
    for name in {name for rank in ranks for name in rank}:
        times = {number: rank[name] - offsets[hosts[number]] for number, rank in enumerate(ranks) if name in rank}
        first = min(times.values())
        for number, time in times.items():
            waited[number] += time - first
    span = min((max(rank.values()) - min(rank.values()) for rank in ranks if rank), default=0.0)
    return waited, span


def _offsets(ranks: Sequence[Entered], hosts: Sequence[str]) -> dict[str, float]:
    """Seconds by which each machine's clock is ahead of that of the first rank's machine.

    A machine that shares no process group with the first one gets 0; it is never compared with it.
    """
    offsets = {hosts[0]: 0.0}
    for host in dict.fromkeys(hosts):
        reference = next((rank for rank, place in zip(ranks, hosts, strict=True) if place == hosts[0]))
        ahead = [
            rank[name] - reference[name]
            for rank, place in zip(ranks, hosts, strict=True)
            if place == host != hosts[0]
            for name in rank
            if name in reference
        ]
        offsets.setdefault(host, statistics.median(ahead) if ahead else 0.0)
    return offsets


class Stragglers(Callback):
    """Reports, on rank 0, a rank that the other ranks wait for; it only reports.

    Args:
        on_event: Writes the event `straggler`, with rank, host, step and cause.
        device: The device of the tensors that the process group gathers.
        host: The name of this rank's machine.
    """

    order = 90

    def __init__(self, on_event: Callable[..., None], device: torch.device, host: str) -> None:
        self._event = on_event
        self._device = device
        self._host = host

    def on_step(self, step: Step, progress: Progress) -> None:
        """Compare the ranks every EVERY steps."""
        if step.number % EVERY:
            return
        ranks = self._gather()
        if not ranks:
            return
        waited, span = lateness([times for _, times in ranks], [host for host, _ in ranks])
        worst = max(range(len(waited)), key=waited.__getitem__)
        others = statistics.median(waited[:worst] + waited[worst + 1 :])
        if span > 0 and (waited[worst] - others) / span > SHARE:
            host = ranks[worst][0]
            share = (waited[worst] - others) / span
            cause = f"the other ranks wait for rank {worst} on host {host} for {share:.0%} of the time"
            self._event("straggler", step=step.number, rank=worst, host=host, cause=cause)

    def _gather(self) -> list[tuple[str, dict[str, float]]]:
        """Each rank's host and entry times, on rank 0; an empty list on other ranks. Collective."""
        times = entered(collectives())
        text = json.dumps([self._host, times]).encode()
        while len(text) > MESSAGE_BYTES:
            times = dict(list(times.items())[len(times) // 2 :])
            text = json.dumps([self._host, times]).encode()
        mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        mine = mine.to(self._device)
        first = dist.get_rank() == 0
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if first else None
        dist.gather(mine, gathered, dst=0)
        texts = [tensor.cpu().numpy().tobytes().rstrip(b"\0") for tensor in gathered or []]
        return [(str(host), times) for host, times in map(json.loads, texts)]
