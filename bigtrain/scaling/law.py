"""The law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 2), for one or many parameter vectors.

A parameter vector is an array whose last axis is (ln A, ln B, ln E, alpha, beta). It holds logarithms because A and B
vary by many orders of magnitude between bootstrap replicates. N is in parameters, D in tokens, C in FLOPs, L in nats
per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

NAMES = ("A", "B", "E", "alpha", "beta")
FLOPS_PER_PARAMETER_TOKEN = 6.0
"""C = 6 N D (Kaplan et al. 2020): per parameter and token, two FLOPs in the forward and four in the backward pass."""


def loss(theta: FloatArray, params: npt.ArrayLike, tokens: npt.ArrayLike) -> FloatArray:
    """The law's loss, in nats per token.

    Args:
        theta: Parameters (ln A, ln B, ln E, alpha, beta), shape (..., 5).
        params: N, of a shape that broadcasts with the leading axes of `theta`.
        tokens: D, of a shape that broadcasts with the leading axes of `theta`.
    """
    ln_n, ln_d = np.log(np.asarray(params, dtype=np.float64)), np.log(np.asarray(tokens, dtype=np.float64))
    terms = (theta[..., 0] - theta[..., 3] * ln_n, theta[..., 1] - theta[..., 4] * ln_d, theta[..., 2])
    with np.errstate(over="ignore"):
        return np.asarray(sum(np.exp(term) for term in terms), dtype=np.float64)


def optimal_params(theta: FloatArray, flops: npt.ArrayLike) -> FloatArray:
    """N* at C FLOPs: (alpha A / (beta B))^(1/(alpha+beta)) (C/6)^(beta/(alpha+beta)) (Hoffmann et al. 2022, eq. 4)."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(_ln_optimal_params(theta, flops)), dtype=np.float64)


def optimal_tokens(theta: FloatArray, flops: npt.ArrayLike) -> FloatArray:
    """D* at C FLOPs, from C = 6 N* D*."""
    ln_nd = np.log(np.asarray(flops, dtype=np.float64) / FLOPS_PER_PARAMETER_TOKEN)
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(ln_nd - _ln_optimal_params(theta, flops)), dtype=np.float64)


def optimal_loss(theta: FloatArray, flops: npt.ArrayLike) -> FloatArray:
    """The lowest loss at C FLOPs, which is the loss at (N*, D*)."""
    with np.errstate(divide="ignore"):
        return loss(theta, optimal_params(theta, flops), optimal_tokens(theta, flops))


def exponent(theta: FloatArray) -> FloatArray:
    """The exponent a of N* ~ C^a: beta / (alpha + beta)."""
    return np.asarray(theta[..., 4] / (theta[..., 3] + theta[..., 4]), dtype=np.float64)


def natural(theta: FloatArray) -> FloatArray:
    """The values (A, B, E, alpha, beta) of a parameter vector, shape (..., 5)."""
    out = np.array(theta, dtype=np.float64)
    with np.errstate(over="ignore"):
        out[..., :3] = np.exp(out[..., :3])
    return out


def _ln_optimal_params(theta: FloatArray, flops: npt.ArrayLike) -> FloatArray:
    alpha, beta = theta[..., 3], theta[..., 4]
    ln_nd = np.log(np.asarray(flops, dtype=np.float64) / FLOPS_PER_PARAMETER_TOKEN)
    ln_g = np.log(alpha / beta) + theta[..., 0] - theta[..., 1]
    return np.asarray((ln_g + beta * ln_nd) / (alpha + beta), dtype=np.float64)
