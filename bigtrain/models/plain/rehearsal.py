"""Simulates a step of several ranks in one process: passes run in turn, and exchange sums where ranks would."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from bigtrain.models.plain.across import differing_uses

T = TypeVar("T")


class Rehearsed:
    """A simulated rank of `together`; it implements `across.BatchRanks`."""

    def __init__(self, stage: _Stage, rank: int, rows: list[int]) -> None:
        self.rank = rank
        self.rows = rows
        self._stage = stage
        self._round = 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, with gradient to each rank."""
        total = self._stage.exchange(self.rank, self._round, x)
        self._round += 1
        return total


class _Stage:
    """State shared by the simulated ranks: whose turn it is, and the exchanged tensors."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._turn = 0
        self._done: set[int] = set()
        self._changed = threading.Condition()
        self._given: dict[int, dict[int, Tensor]] = {}
        self._generators: dict[int, Any] = {}

    def enter(self, rank: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == rank)

    def leave(self, rank: int) -> None:
        with self._changed:
            self._done.add(rank)
            self._pass_on(rank)

    def exchange(self, rank: int, number: int, x: Tensor) -> Tensor:
        with self._changed:
            self._given.setdefault(number, {})[rank] = x
            state = torch.get_rng_state(), np.random.get_state(), random.getstate()
            self._pass_on(rank)
            self._changed.wait_for(lambda: self._turn == rank)
            torch.set_rng_state(state[0])
            np.random.set_state(state[1])
            random.setstate(state[2])
            given = self._given[number]
            if len(given) < self._ranks or len({one.shape for one in given.values()}) > 1:
                raise differing_uses()
            total = given[0]
            for other in range(1, self._ranks):
                total = total + given[other]
            return total

    def _pass_on(self, rank: int) -> None:
        following = [(rank + step) % self._ranks for step in range(1, self._ranks + 1)]
        waiting = [other for other in following if other not in self._done]
        self._turn = waiting[0] if waiting else -1
        self._changed.notify_all()


def together(functions: Sequence[Callable[[Rehearsed], T]], rows: list[int]) -> list[T]:
    """Run each function as one of the ranks that share a global batch, and return their results.

    Args:
        functions: One function per rank; each gets its simulated rank.
        rows: Number of sequences of each rank.

    Raises:
        Exception: A function raised it; if several did, that of the lowest rank.
    """
    stage = _Stage(len(functions))
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}

    def run(rank: int) -> None:
        stage.enter(rank)
        try:
            results[rank] = functions[rank](Rehearsed(stage, rank, rows))
        except Exception as error:  # noqa: BLE001 - raised in the caller's thread
            errors[rank] = error
        finally:
            stage.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[rank] for rank in range(len(functions))]
