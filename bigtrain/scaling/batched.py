"""Thousands of refits of one problem at once, by variable projection and Newton's method.

A bootstrap replicate consists of the same runs with other weights. Variable projection needs no starting point: for
each pair of exponents of a grid the law is linear in A, B and E, and a few matrix products give the best pair of each
replicate. Newton's method then starts from that pair and from the solution of the full fit. The lower of the two minima
is the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem, terms, value

GRID = np.exp(np.linspace(np.log(0.03), np.log(2.0), 16))
"""Exponents of the grid of variable projection; published exponents lie between 0.05 and 1."""
BLOCK = 32
"""Number of replicates that are projected together, so that their grids fit into the CPU's cache."""
EXPONENT_RANGE = (0.002, 6.0)
LN_RANGE = 35.0
"""Largest absolute value of ln A, ln B and ln E of centred runs; beyond it a term is negligible or the only one."""
MAX_STEPS = 200
ROUNDING = 5 * np.finfo(np.float64).eps
"""Ratio to the largest eigenvalue of a 5 x 5 matrix below which an eigenvalue cannot be distinguished from zero."""
TOLERANCE = 1e-11
"""Newton's method ends when a step is expected to reduce the objective by less than this relative amount."""
SAME = 1e-6
"""Two searches have reached the same minimum if their objectives differ by less than this relative amount."""


@dataclass(frozen=True)
class Refits:
    """The results of R refits."""

    theta: FloatArray
    """Centred parameters, shape (R, 5)."""
    objective: FloatArray
    """Objectives in the scale of `objective.value`, shape (R,)."""
    converged: np.ndarray
    """Whether each refit converged, bool of shape (R,)."""
    agreed: np.ndarray
    """Whether the warm start and variable projection reached the same minimum, bool of shape (R,)."""


def refit(problem: Problem, weights: FloatArray, warm: FloatArray, robust: FloatArray | None = None) -> Refits:
    """Refit the problem with R sets of weights.

    Args:
        problem: The runs and the objective.
        weights: Weights of the runs, shape (R, n).
        warm: Centred parameters of the full fit, shape (5,).
        robust: Additional weights of the runs in variable projection, shape (n,); see `robust_weights`.
    """
    starts = (np.broadcast_to(warm, (len(weights), 5)), project(problem, weights, robust))
    first = problem.deltas[0]
    (a, from_warm, done_warm), (b, from_grid, done_grid) = (_newton(problem, weights, at, first) for at in starts)
    lower = from_grid < from_warm
    theta = np.where(lower[:, None], b, a)
    objective = np.minimum(from_warm, from_grid)
    agreed = np.abs(from_warm - from_grid) <= SAME * np.abs(objective)
    converged = np.where(lower, done_grid, done_warm)
    for delta in problem.deltas[1:]:
        theta, objective, converged = _newton(problem, weights, theta, delta)
    return Refits(theta, objective, converged, agreed)


def robust_weights(problem: Problem, theta: FloatArray) -> FloatArray:
    """Weights of the runs, shape (n,), with which least squares has its minimum where the problem's loss function has.

    Args:
        problem: The runs and the loss function.
        theta: Centred parameters at that minimum, shape (5,).
    """
    residual = terms(problem, theta[None]).residual[0]
    if problem.function == "squares":
        return np.ones(len(residual))
    delta = max(problem.deltas[0], 1e-12)
    return np.asarray(np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300)), dtype=np.float64)


def project(problem: Problem, weights: FloatArray, robust: FloatArray | None = None) -> FloatArray:
    """Find the best pair of exponents of a grid for each set of weights; A, B, E come from non-negative least squares.

    Args:
        problem: The runs and the loss function.
        weights: Weights of the runs, shape (R, n).
        robust: Additional weights of the runs, shape (n,); None: all are 1.

    Returns:
        Centred parameters, shape (R, 5).
    """
    scale = np.ones(len(problem.ln_loss)) if problem.function == "squares" else np.exp(-problem.ln_loss)
    target = np.exp(problem.ln_loss) * scale
    w = weights if robust is None else weights * robust
    u = np.exp(-GRID[:, None] * problem.ln_n) * scale
    v = np.exp(-GRID[:, None] * problem.ln_d) * scale
    pairs = [(i, i) for i in range(len(GRID))] if problem.equal_exponents else list(np.ndindex(len(GRID), len(GRID)))
    first, second = np.array(pairs).T
    products = {
        "uu": (u**2)[first], "vv": (v**2)[second], "uv": u[first] * v[second], "uc": (u * scale)[first],
        "vc": (v * scale)[second], "cc": (scale**2)[None], "ut": (u * target)[first], "vt": (v * target)[second],
        "ct": (scale * target)[None],
    }  # fmt: skip
    # The search continues in logarithms, so that no coefficient may be zero.
    floor = 1e-4 * np.exp(problem.ln_loss.mean())
    starts = np.empty((len(weights), 5))
    for low in range(0, len(weights), BLOCK):
        gram = {name: w[low : low + BLOCK] @ product.T for name, product in products.items()}
        gain, coefficients = _nonnegative(gram)
        best = np.argmax(gain, axis=1)
        chosen = np.maximum(coefficients[:, np.arange(len(best)), best], floor)
        starts[low : low + BLOCK] = np.column_stack([*np.log(chosen), GRID[first[best]], GRID[second[best]]])
    return starts


def _nonnegative(gram: dict[str, FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Non-negative least squares in three unknowns for every pair of exponents, by trying every set of non-zero ones.

    Returns:
        The reduction of the sum of squares by each of the G pairs, shape (R, G), and its (A, B, E), shape (3, R, G).
    """
    uu, vv, uv, uc, vc, ut, vt = (gram[name] for name in ("uu", "vv", "uv", "uc", "vc", "ut", "vt"))
    cc, ct = np.broadcast_to(gram["cc"], uv.shape), np.broadcast_to(gram["ct"], uv.shape)
    zero = np.zeros_like(uv)
    m_uu, m_uv, m_uc = vv * cc - vc**2, vc * uc - uv * cc, uv * vc - vv * uc
    determinant = uu * m_uu + uv * m_uv + uc * m_uc
    m_vv, m_vc, m_cc = uu * cc - uc**2, uv * uc - uu * vc, uu * vv - uv**2
    # If all runs of a replicate have the same N (or D), columns are parallel, and such a set has no unique solution.
    third = _inverse(determinant, uu * vv * cc)
    by_u, by_v, by_c = _inverse(m_uu, vv * cc), _inverse(m_vv, uu * cc), _inverse(m_cc, uu * vv)
    candidates = [
        (
            (m_uu * ut + m_uv * vt + m_uc * ct) * third,
            (m_uv * ut + m_vv * vt + m_vc * ct) * third,
            (m_uc * ut + m_vc * vt + m_cc * ct) * third,
        ),
        ((vv * ut - uv * vt) * by_c, (uu * vt - uv * ut) * by_c, zero),
        ((cc * ut - uc * ct) * by_v, zero, (uu * ct - uc * ut) * by_v),
        (zero, (cc * vt - vc * ct) * by_u, (vv * ct - vc * vt) * by_u),
    ]
    best_gain, best = np.full_like(uv, -np.inf), np.stack([zero, zero, ct / cc])
    for one in candidates:
        coefficients = np.stack(one)
        gain = one[0] * ut + one[1] * vt + one[2] * ct
        better = (coefficients >= 0).all(axis=0) & np.isfinite(gain) & (gain > best_gain)
        best_gain = np.where(better, gain, best_gain)
        best = np.where(better, coefficients, best)
    return best_gain, best


def _inverse(determinant: FloatArray, scale: FloatArray) -> FloatArray:
    """1 / determinant; NaN where the determinant is zero up to rounding, relative to the product of the diagonal."""
    return np.divide(1.0, determinant, out=np.full_like(determinant, np.nan), where=determinant > ROUNDING * scale)


def descend(problem: Problem, weights: FloatArray, start: FloatArray) -> tuple[FloatArray, FloatArray, np.ndarray]:
    """Damped Newton's method from R starting points, each with its own damping.

    Args:
        problem: The runs and the objective.
        weights: Weights of the runs, shape (R, n).
        start: Centred parameters, shape (R, 5).

    Returns:
        Centred parameters, shape (R, 5), scaled objectives, shape (R,), and whether each converged, shape (R,).
    """
    theta = np.array(start)
    done = np.zeros(len(theta), dtype=bool)
    objective = np.zeros(len(theta))
    for delta in problem.deltas:
        theta, objective, done = _newton(problem, weights, theta, delta)
    return theta, objective, done


def _newton(
    problem: Problem, weights: FloatArray, theta: FloatArray, delta: float
) -> tuple[FloatArray, FloatArray, np.ndarray]:
    theta = np.array(theta)
    objective = value(problem, weights, theta, delta)
    damping = np.full(len(theta), 1.0)
    done = np.zeros(len(theta), dtype=bool)
    active = np.arange(len(theta))
    basis = problem.basis
    for _ in range(MAX_STEPS):
        w, at = weights[active], theta[active]
        gradient, hessian, majorant = _derivatives(problem, w, at, delta)
        gradient, hessian = gradient @ basis, basis.T @ hessian @ basis
        majorant = basis.T @ majorant @ basis
        ridge = 1e-12 * np.trace(majorant, axis1=1, axis2=2)[:, None, None] * np.eye(basis.shape[1])
        system = hessian + damping[active, None, None] * majorant + ridge
        step = -np.linalg.solve(_positive(system, majorant), gradient[..., None])[..., 0]
        trial = _bounded(at + step @ basis.T)
        reached = value(problem, w, trial, delta)
        gained = objective[active] - reached
        better = gained > 0
        theta[active[better]], objective[active[better]] = trial[better], reached[better]
        size = TOLERANCE * (np.abs(objective[active]) + 1e-300)
        expected = -np.einsum("rp,rp->r", gradient, step)
        finished = (expected <= size) | (~better & (damping[active] > 1e10))
        damping[active] = np.where(better, damping[active] * 0.2, damping[active] * 5.0 + 1e-9)
        done[active[finished]] = True
        active = active[~finished]
        if not len(active):
            break
    return theta, objective, done


def _positive(system: FloatArray, majorant: FloatArray) -> FloatArray:
    """The matrices of `system`, with the majorant in place of those that are not positive definite."""
    eigenvalues = np.linalg.eigvalsh(system)
    scale = np.trace(majorant, axis1=1, axis2=2)
    # The matrix of a replicate with fewer distinct runs than parameters is singular up to rounding, which damping would
    # magnify.
    bad = eigenvalues[:, 0] <= np.maximum(1e-13 * scale, ROUNDING * eigenvalues[:, -1])
    if not bad.any():
        return system
    out = system.copy()
    out[bad] = majorant[bad] + 1e-9 * scale[bad, None, None] * np.eye(system.shape[1])
    return out


def _bounded(theta: FloatArray) -> FloatArray:
    out = np.clip(theta, -LN_RANGE, LN_RANGE)
    out[:, 3:] = np.clip(out[:, 3:], *EXPONENT_RANGE)
    return out


def _derivatives(
    problem: Problem, weights: FloatArray, theta: FloatArray, delta: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Derivatives of the scaled objective by the five parameters.

    Returns:
        The gradient, shape (R, 5), the Hessian, shape (R, 5, 5), and the Gauss-Newton matrix of a quadratic upper
        bound of the loss function, shape (R, 5, 5).
    """
    at = terms(problem, theta)
    p1, p2, p3 = at.parts
    x, y = problem.ln_n, problem.ln_d
    if problem.function == "squares":
        slope, curvature, above = weights * at.residual, weights, weights
        gauss = curvature
    else:
        size = np.abs(at.residual)
        slope = weights * np.clip(at.residual / delta, -1.0, 1.0)
        above = weights / np.maximum(size, delta)
        curvature = np.where(size <= delta, above, 0.0)
        # Second derivative of the logarithm of a sum of exponentials: d2 ln s = sum_k p_k g_k g_k' - J J'.
        gauss = curvature - slope
    jacobian = np.stack([p1, p2, p3, -p1 * x, -p2 * y], axis=1)
    gradient = np.einsum("rkn,rn->rk", jacobian, slope)
    hessian = (jacobian * gauss[:, None]) @ jacobian.transpose(0, 2, 1)
    majorant = (jacobian * above[:, None]) @ jacobian.transpose(0, 2, 1)
    pull1, pull2 = slope * p1, slope * p2
    hessian[:, 0, 0] += gradient[:, 0]
    hessian[:, 1, 1] += gradient[:, 1]
    hessian[:, 2, 2] += gradient[:, 2]
    hessian[:, 0, 3] += gradient[:, 3]
    hessian[:, 3, 0] += gradient[:, 3]
    hessian[:, 1, 4] += gradient[:, 4]
    hessian[:, 4, 1] += gradient[:, 4]
    hessian[:, 3, 3] += pull1 @ x**2
    hessian[:, 4, 4] += pull2 @ y**2
    return gradient, hessian, majorant
