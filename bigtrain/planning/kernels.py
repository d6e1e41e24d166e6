"""How long one accelerator computes: matrix products by their shape, attention, and work that memory bounds.

A product (m, n, k) is cut into tiles that the accelerator's processors compute side by side. The last round of tiles
may leave processors idle, a short k leaves a tile's start-up uncovered, and no product is faster than its operands can
be read. What is left to measure is one rate: the share of the data sheet that large products reach (`Rates.matmul`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bigtrain.hardware.cluster import Cluster

TILE_ROWS, TILE_COLUMNS = 256, 128
"""Of the tile that the libraries choose for large products."""
SPLIT_K = 2048
"""Depth that a product of few tiles is cut into, so that more processors have work."""
ALIGNED, MISALIGNED = 8, 3.0
"""A dimension that is no multiple of 8 numbers cannot be read in whole vectors; such products take about 3 times as
long (NVIDIA, Matrix Multiplication Background, "Tensor Core requirements")."""
START_UP_K = 160
"""Depth of a product in whose time a tile is set up and written."""


@dataclass(frozen=True)
class Matmul:
    """A product of (m, k) and (k, n)."""

    m: int
    n: int
    k: int
    count: int = 1
    """How many are computed side by side, as of the heads of attention."""
    repeats: float = 1
    """How often, one after the other."""

    @property
    def flops(self) -> int:
        """Of one repeat."""
        return 2 * self.m * self.n * self.k * self.count

    @property
    def gradients(self) -> tuple[Matmul, Matmul]:
        """The products of the backward pass: the input's gradient, and the weight's."""
        return replace(self, n=self.k, k=self.n), replace(self, m=self.n, n=self.k, k=self.m)


@dataclass(frozen=True)
class Work:
    """What one pass through a part of a model computes on one accelerator."""

    matmuls: tuple[Matmul, ...] = ()
    attention_flops: float = 0.0
    """By fused kernels."""
    moved_bytes: float = 0.0
    """Read and written by kernels that memory bounds."""
    kernels: float = 0
    """Kernels that the host starts."""

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
    """Time of some work, by what bounds it."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0

    @property
    def busy(self) -> float:
        """All."""
        return self.matmul + self.attention + self.memory

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.matmul + other.matmul, self.attention + other.attention, self.memory + other.memory)

    def __mul__(self, times: int) -> Seconds:
        return Seconds(self.matmul * times, self.attention * times, self.memory * times)


_products: dict[tuple[float, float, int, int], dict[Matmul, float]] = {}
"""Times of products that were computed before: a search meets few shapes, many times each."""


class Accelerator:
    """One accelerator of a cluster at one precision."""

    def __init__(self, cluster: Cluster, precision: str, number: int) -> None:
        """Args:
        number: Bytes of a number.

        Raises:
            ValueError: The device has no rate for this precision.
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
        """Time of some work that nothing interrupts."""
        matmul = sum(self.matmul_seconds(one) for one in work.matmuls)
        attention = work.attention_flops / self._attention
        return Seconds(matmul, attention, work.moved_bytes / self._memory)

    def matmul_seconds(self, one: Matmul) -> float:
        """Time of a product."""
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
    """The backward pass of products."""
    return tuple(gradient for one in matmuls for gradient in one.gradients)
