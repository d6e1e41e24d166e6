"""The law L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 2), for one set of parameters or many.

Parameters travel as arrays whose last axis is (ln A, ln B, ln E, alpha, beta): A and B span many decades from one
bootstrap replicate to the next, their logarithms do not. N in parameters, D in tokens, C in FLOPs, L in nats.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

NAMES = ("A", "B", "E", "alpha", "beta")
FLOPS_PER_PARAMETER_TOKEN = 6.0
"""C = 6 N D (Kaplan et al. 2020): two FLOPs a weight forward and four backward."""


def loss(theta: FloatArray, params: npt.ArrayLike, tokens: npt.ArrayLike) -> FloatArray:
    """The law's loss in nats a token.

    Args:
        theta: Shape (..., 5), (ln A, ln B, ln E, alpha, beta).
        params: N, shape that broadcasts with theta's leading axes.
        tokens: D, likewise.
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
    """D* at C FLOPs, by C = 6 N* D*."""
    ln_nd = np.log(np.asarray(flops, dtype=np.float64) / FLOPS_PER_PARAMETER_TOKEN)
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(ln_nd - _ln_optimal_params(theta, flops)), dtype=np.float64)


def optimal_loss(theta: FloatArray, flops: npt.ArrayLike) -> FloatArray:
    """The loss at (N*, D*)."""
    with np.errstate(divide="ignore"):
        return loss(theta, optimal_params(theta, flops), optimal_tokens(theta, flops))


def exponent(theta: FloatArray) -> FloatArray:
    """a of N* ~ C^a: beta / (alpha + beta)."""
    return np.asarray(theta[..., 4] / (theta[..., 3] + theta[..., 4]), dtype=np.float64)


def natural(theta: FloatArray) -> FloatArray:
    """(A, B, E, alpha, beta) of (ln A, ln B, ln E, alpha, beta), shape (..., 5)."""
    out = np.array(theta, dtype=np.float64)
    with np.errstate(over="ignore"):
        out[..., :3] = np.exp(out[..., :3])
    return out


def _ln_optimal_params(theta: FloatArray, flops: npt.ArrayLike) -> FloatArray:
    alpha, beta = theta[..., 3], theta[..., 4]
    ln_nd = np.log(np.asarray(flops, dtype=np.float64) / FLOPS_PER_PARAMETER_TOKEN)
    ln_g = np.log(alpha / beta) + theta[..., 0] - theta[..., 1]
    return np.asarray((ln_g + beta * ln_nd) / (alpha + beta), dtype=np.float64)
