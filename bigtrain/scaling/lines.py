"""The lines in ln C that approaches 1 and 2 fit: ln N* = slope ln C + intercept, and the same for ln D*."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigtrain.scaling.law import FloatArray


@dataclass(frozen=True)
class Lines:
    """The lines of ln N* and ln D* against ln C, with C in FLOPs."""

    params_slope: float
    params_intercept: float
    tokens_slope: float
    tokens_intercept: float

    def as_array(self) -> FloatArray:
        """The four numbers in the order of the fields, shape (4,)."""
        return np.array([self.params_slope, self.params_intercept, self.tokens_slope, self.tokens_intercept])


def line(x: FloatArray, y: FloatArray) -> tuple[float, float]:
    """Slope and intercept of the least-squares line through points (x, y)."""
    middle = x.mean()
    slope = float((x - middle) @ (y - y.mean()) / ((x - middle) @ (x - middle)))
    return slope, float(y.mean() - slope * middle)


def params_at(lines: FloatArray, flops: float) -> FloatArray:
    """N* at C FLOPs for lines of shape (..., 4)."""
    return np.asarray(np.exp(lines[..., 0] * np.log(flops) + lines[..., 1]), dtype=np.float64)


def tokens_at(lines: FloatArray, flops: float) -> FloatArray:
    """D* at C FLOPs for lines of shape (..., 4)."""
    return np.asarray(np.exp(lines[..., 2] * np.log(flops) + lines[..., 3]), dtype=np.float64)
