"""Thousands of refits of one problem at once: variable projection to find the valley, Newton's method to its floor.

A bootstrap replicate is the same runs with other weights. Variable projection needs no starting point: over a grid of
the two exponents the law is linear in A, B and E, and each replicate's best cell follows from a handful of matrix
products. Newton's method then goes down from that cell and from the full fit's solution, and the lower end counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigtrain.scaling.law import FloatArray
from bigtrain.scaling.objective import Problem, terms, value

GRID = np.exp(np.linspace(np.log(0.03), np.log(2.0), 16))
"""Exponents tried by variable projection: published ones lie between .05 and 1."""
BLOCK = 32
"""Replicates projected together: their grids fit into a processor's cache."""
EXPONENT_RANGE = (0.002, 6.0)
LN_RANGE = 35.0
"""How far a logarithm of a centred term may lie from 0: beyond it the term is nothing, or all."""
MAX_STEPS = 200
ROUNDING = 5 * np.finfo(np.float64).eps
"""Of the largest eigenvalue of a 5 x 5 matrix: a smaller one cannot be distinguished from zero."""
TOLERANCE = 1e-11
"""Of the objective: a step that would gain less is the last."""
SAME = 1e-6
"""Relative: two ends of a search are one minimum where their objectives differ by less."""


@dataclass(frozen=True)
class Refits:
    """The ends of R refits."""

    theta: FloatArray
    """Shape (R, 5), centred."""
    objective: FloatArray
    """Shape (R,), scaled as in `objective.value`."""
    converged: np.ndarray
    """Shape (R,), bool."""
    agreed: np.ndarray
    """Shape (R,), bool: whether the warm start and variable projection ended in the same minimum."""


def refit(problem: Problem, weights: FloatArray, warm: FloatArray, robust: FloatArray | None = None) -> Refits:
    """Refit the problem under R sets of weights.

    Args:
        weights: Shape (R, n).
        warm: Shape (5,), centred: the full fit's solution.
        robust: Shape (n,), what the full fit makes of each run's outlyingness; see `robust_weights`.
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
    """Weights, shape (n,), by which least squares has the minimum that the problem's own function has at `theta`."""
    residual = terms(problem, theta[None]).residual[0]
    if problem.function == "squares":
        return np.ones(len(residual))
    delta = max(problem.deltas[0], 1e-12)
    return np.asarray(np.minimum(1.0, delta / np.maximum(np.abs(residual), 1e-300)), dtype=np.float64)


def project(problem: Problem, weights: FloatArray, robust: FloatArray | None = None) -> FloatArray:
    """The best cell of a grid of exponents for each set of weights, with A, B, E by non-negative least squares.

    Returns:
        Shape (R, 5), centred.
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
    # A logarithm cannot start at zero.
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
    """Non-negative least squares in three unknowns for every cell, by trying every set of them that is not zero.

    Returns:
        How much each cell explains, shape (R, G), and its (A, B, E), shape (3, R, G).
    """
    uu, vv, uv, uc, vc, ut, vt = (gram[name] for name in ("uu", "vv", "uv", "uc", "vc", "ut", "vt"))
    cc, ct = np.broadcast_to(gram["cc"], uv.shape), np.broadcast_to(gram["ct"], uv.shape)
    zero = np.zeros_like(uv)
    m_uu, m_uv, m_uc = vv * cc - vc**2, vc * uc - uv * cc, uv * vc - vv * uc
    determinant = uu * m_uu + uv * m_uv + uc * m_uc
    m_vv, m_vc, m_cc = uu * cc - uc**2, uv * uc - uu * vc, uu * vv - uv**2
    # Runs of one N (or one D) in a replicate make columns parallel: such a set has no solution of its own.
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
    """1 / determinant; NaN where it is zero but for rounding, in comparison with the product of its diagonal."""
    return np.divide(1.0, determinant, out=np.full_like(determinant, np.nan), where=determinant > ROUNDING * scale)


def descend(problem: Problem, weights: FloatArray, start: FloatArray) -> tuple[FloatArray, FloatArray, np.ndarray]:
    """Damped Newton from R starting points, each replicate with its own damping.

    Returns:
        Parameters (R, 5), scaled objectives (R,), and whether each converged (R,).
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
    """The system where it is positive definite, else a multiple of the majorant, which always is."""
    eigenvalues = np.linalg.eigvalsh(system)
    scale = np.trace(majorant, axis1=1, axis2=2)
    # A replicate of fewer distinct runs than parameters has a singular one, but for rounding, which damping magnifies.
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
    """Gradient (R, 5), Hessian (R, 5, 5) and the Gauss-Newton matrix of the quadratic that lies above (R, 5, 5)."""
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
        # The logarithm bends the sum of exponentials: d2 ln s = sum_k p_k g_k g_k' - J J'.
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
