"""Estimates the compute time of one accelerator: matmuls by their shape, attention, and memory-bound kernels.

A matmul (m, n, k) is split into tiles, which the accelerator's processors compute in parallel. Three effects depend on
the shape. The last round of tiles may leave processors idle. With a short k the set-up of a tile takes a larger share.
And no matmul is faster than its operands can be read. Only one rate must be measured: the share of the data sheet's
peak that large matmuls reach (`Rates.matmul`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bigtrain.hardware.cluster import Cluster

TILE_ROWS, TILE_COLUMNS = 256, 128
"""Size of the tile that the libraries choose for large matmuls."""
SPLIT_K = 2048
"""Length of k of each part, if a matmul of few tiles is split along k to use more processors."""
ALIGNED, MISALIGNED = 8, 3.0
"""Dimensions must be a multiple of 8 elements to be read as full vectors. Other matmuls take about 3 times as long
(NVIDIA, Matrix Multiplication Background, "Tensor Core requirements")."""
START_UP_K = 160
"""The set-up and the write of a tile take as long as this length of k."""


@dataclass(frozen=True)
class Matmul:
    """A matmul of (m, k) and (k, n)."""

    m: int
    n: int
    k: int
    count: int = 1
    """Number of matmuls of this shape in one batched kernel, such as one for each head of attention."""
    repeats: float = 1
    """Number of times that the kernel runs, one after the other."""

    @property
    def flops(self) -> int:
        """FLOPs of one repeat."""
        return 2 * self.m * self.n * self.k * self.count

    @property
    def gradients(self) -> tuple[Matmul, Matmul]:
        """The matmuls of the backward pass: for the gradient of the input, and of the weight."""
        return replace(self, n=self.k, k=self.n), replace(self, m=self.n, n=self.k, k=self.m)


@dataclass(frozen=True)
class Work:
    """The computation of one pass through a part of a model on one accelerator."""

    matmuls: tuple[Matmul, ...] = ()
    attention_flops: float = 0.0
    """FLOPs of fused attention kernels."""
    moved_bytes: float = 0.0
    """Bytes that memory-bound kernels read and write."""
    kernels: float = 0
    """Number of kernels that the host starts."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matmuls + other.matmuls,
            self.attention_flops + other.attention_flops,
            self.moved_bytes + other.moved_bytes,
            self.kernels + other.kernels,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            tuple(replace(one, repeats=one.repeats * times) for one in self.matmuls),
            self.attention_flops * times,
            self.moved_bytes * times,
            self.kernels * times,
        )


@dataclass(frozen=True)
class Seconds:
    """Compute time in seconds, by what bounds it."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    @property
    def busy(self) -> float:
        """Sum of the three times."""
        return self.matmul + self.attention + self.memory

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.matmul + other.matmul, self.attention + other.attention, self.memory + other.memory)

    def __mul__(self, times: int) -> Seconds:
        return Seconds(self.matmul * times, self.attention * times, self.memory * times)


_products: dict[tuple[float, float, int, int], dict[Matmul, float]] = {}
"""Cache of matmul times, by accelerator: a search evaluates few shapes, many times each."""


class Accelerator:
    """One accelerator of a cluster at one precision."""

    def __init__(self, cluster: Cluster, precision: str, number: int) -> None:
        """Compute the rates that kernels reach.

        Args:
            precision: Dtype of the matmuls.
            number: Bytes per element of this dtype.

        Raises:
            ValueError: The device has no peak rate for this precision.
        """
        peak = cluster.device.peak(precision)
        if peak is None:
            raise ValueError(f"{cluster.device.name} has no peak rate for {precision}")
        rates = cluster.rates
        self._peak, self._attention = peak * rates.matmul, peak * rates.attention
        self._memory = cluster.device.bandwidth_bytes_per_s * rates.memory
        self._processors, self._number = cluster.processors, number
        key = (self._peak, self._memory, self._processors, number)
        self._known = _products.setdefault(key, {})

    def seconds(self, work: Work) -> Seconds:
        """Time of some work, without communication and without waiting for the host."""
        matmul = sum(self.matmul_seconds(one) for one in work.matmuls)
        attention = work.attention_flops / self._attention
        return Seconds(matmul, attention, work.moved_bytes / self._memory)

    def matmul_seconds(self, one: Matmul) -> float:
        """Seconds of a matmul with its repeats."""
        known = self._known.get(one)
        if known is None:
            known = self._known[one] = self._matmul_seconds(one)
        return known

    def _matmul_seconds(self, one: Matmul) -> float:
        if not one.flops:
            return 0.0
        tiles = math.ceil(one.m / TILE_ROWS) * math.ceil(one.n / TILE_COLUMNS) * one.count
        padded = tiles * TILE_ROWS * TILE_COLUMNS / (one.m * one.n * one.count)
        parts = max(1, min(self._processors // tiles, one.k // SPLIT_K)) if tiles < self._processors else 1
        rounds = tiles * parts / self._processors
        idle = math.ceil(rounds) / rounds
        start = 1 + START_UP_K * parts / one.k
        compute = one.flops / self._peak * padded * idle * start
        if self._number < 4 and any(size % ALIGNED for size in (one.m, one.n, one.k)):
            compute *= MISALIGNED
        moved = self._number * (one.m * one.k + one.k * one.n + one.m * one.n) * one.count / self._memory
        return one.repeats * max(compute, moved)


def gradients(matmuls: Iterable[Matmul]) -> tuple[Matmul, ...]:
    """The matmuls of the backward pass of `matmuls`."""
    return tuple(gradient for one in matmuls for gradient in one.gradients)
