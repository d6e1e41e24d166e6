"""Work that several ranks do together, with one outcome on which all of them agree.

Exceptions are sent as plain text. An exception that cannot be pickled, raised on one rank, would otherwise leave the
other ranks waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch.distributed as dist

from bigtrain.checkpoint.commit import FencedError
from bigtrain.config import CorruptionError, UserError

T = TypeVar("T")


class RanksLostError(RuntimeError):
    """The connection between the ranks broke during common work, so they cannot agree on its outcome."""


class WorkFailedError(RuntimeError):
    """Common work failed on some rank; the same error is raised on every rank."""


@dataclass(frozen=True)
class _Failure:
    rank: int
    kind: Literal["corruption", "user", "fenced", "other"]
    what: str
    where: str | None = None
    fix: str | None = None

    @classmethod
    def of(cls, rank: int, error: Exception) -> _Failure:
        if isinstance(error, UserError):
            kind: Any = "corruption" if isinstance(error, CorruptionError) else "user"
            return cls(rank, kind, error.what, error.where, error.fix)
        if isinstance(error, FencedError):
            return cls(rank, "fenced", str(error))
        cause = _root_cause(error)
        return cls(rank, "other", f"{type(cause).__name__}: {cause}")


def _root_cause(error: BaseException) -> BaseException:
    """The OSError that caused an exception: "no space left" rather than torch's "unexpected pos 704 vs 598"."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return error


class RankGroup:
    """The ranks of a process group; a single process if the group is None.

    Args:
        group: A gloo group, or another one that supports collectives of objects.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @property
    def first(self) -> bool:
        """Whether this is the first rank, which acts for all."""
        return self.rank == 0

    def collect(self, value: T) -> list[T]:
        """Gather each rank's value on the first rank, in order of rank; the result is empty on the other ranks."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        self._contact(lambda: dist.gather_object(value, values, dst=self._global_first, group=self.group))
        return values or []

    def share(self, value: T | None) -> T:
        """Broadcast the first rank's value to all ranks."""
        if self.group is None:
            return cast(T, value)
        box = [value]
        self._contact(lambda: dist.broadcast_object_list(box, src=self._global_first, group=self.group))
        return cast(T, box[0])

    def deal(self, values: list[T] | None) -> T:
        """Scatter the first rank's list: rank r receives the value with index r."""
        if self.group is None:
            return cast(list[T], values)[0]
        box: list[Any] = [None]
        self._contact(
            lambda: dist.scatter_object_list(
                box, values if self.first else None, src=self._global_first, group=self.group
            )
        )
        return cast(T, box[0])

    def together(self, work: Callable[[], T]) -> list[T]:
        """Call `work` on every rank; if it fails on one rank, the same error is raised on all ranks.

        Returns:
            On the first rank the results in order of rank; empty on the others.

        Raises:
            CorruptionError, UserError, FencedError: `work` raised this error on a rank.
            WorkFailedError: `work` raised another exception on a rank; the message describes it.
        """
        try:
            outcome: tuple[T | None, _Failure | None] = (work(), None)
        except Exception as error:  # noqa: BLE001 - whatever the error, the other ranks must get it
            outcome = (None, _Failure.of(self.rank, error))
        outcomes = self.collect(outcome)
        failures = self.share([failure for _, failure in outcomes if failure] if self.first else None)
        if failures:
            raise self._as_error(failures)
        return [cast(T, result) for result, _ in outcomes]

    def once(self, work: Callable[[], T]) -> T:
        """Call `work` on the first rank, and return its result, or raise its error, on all ranks."""
        results = self.together(lambda: work() if self.first else None)
        return self.share(cast(T, results[0]) if self.first else None)

    def _as_error(self, failures: list[_Failure]) -> Exception:
        failure = failures[0]
        if failure.kind == "fenced":
            return FencedError(failure.what)
        if failure.kind == "corruption":
            return CorruptionError(failure.what, failure.where, failure.fix)
        if failure.kind == "user":
            return UserError(failure.what, failure.where, failure.fix)
        more = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        place = f"rank {failure.rank}: " if self.size > 1 else ""
        return WorkFailedError(f"{place}{failure.what}{more}")

    @property
    def _global_first(self) -> int:
        return dist.get_global_rank(cast(dist.ProcessGroup, self.group), 0)

    def _contact(self, operation: Callable[[], Any]) -> None:
        try:
            operation()
        except RuntimeError as error:
            raise RanksLostError(f"the ranks lost contact: {error}") from error


def world_group() -> dist.ProcessGroup | None:
    """The default process group if there are several processes, else None."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def own_group(timeout_s: float) -> dist.ProcessGroup | None:
    """Create a gloo group of all processes for the caller's own use; None for a single process. Collective.

    If a background thread used the default group, the order of its collectives and those of training would differ
    between ranks. This aborts gloo and deadlocks NCCL.

    Args:
        timeout_s: Seconds that a rank waits for the others in one collective.
    """
    if world_group() is None:
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))
