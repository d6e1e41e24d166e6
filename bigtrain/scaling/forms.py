"""Laws of the user's own form: an expression in N, D and constants, parsed here and never evaluated as code.

    E + A / N**alpha + B / D**beta
    E + A / N**alpha + B / (U + U * R * (1 - exp((1 - D / U) / R)))**beta        "repeats"

N are parameters, D tokens, U unique tokens (at most D). Every other name is a constant, which the fit finds; constants
are positive: write a minus before one that lowers the loss. There are + - * / ** and parentheses, exp, log, sqrt, min
and max. Values come with their derivatives by the logarithm of each constant, by the rules of calculus (forward mode).

"repeats" is Muennighoff et al. 2023, eq. 5: D tokens that are D/U epochs of U teach as D_eff = U + U R (1 - exp(-(D/U
- 1) / R)) fresh ones; R is the number of repeats after which more of them hardly teach (about 15 there).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.scaling.document import unpack
from bigtrain.scaling.law import FLOPS_PER_PARAMETER_TOKEN, FloatArray

VARIABLES = ("N", "D", "U")
NAMED = {
    "chinchilla": "E + A / N**alpha + B / D**beta",
    "repeats": "E + A / N**alpha + B / (U + U * R * (1 - exp((1 - D / U) / R)))**beta",
}
"""Forms that have a name."""
MAX_CONSTANTS = 12
_FIX = 'write for example --form "E + A / N**alpha + B / D**beta"'
_GRID = 200
_PATH_REPLICATES = 200
_LOW, _HIGH = 1e-4, 1e4
"""Factors of the square root of C / 6 between which N* is sought."""
Dual = tuple[FloatArray, FloatArray]
"""A value, shape (R, n) or what broadcasts to it, and its derivatives, shape (k, R, n) likewise."""


def _power(left: Dual, right: Dual) -> Dual:
    value = left[0] ** right[0]
    base = right[0] * left[0] ** (right[0] - 1)
    # The logarithm of a base that is not positive counts only where the exponent has a derivative.
    by_exponent = value * np.log(np.where(left[0] > 0, left[0], np.nan)) if np.any(right[1]) else np.zeros_like(value)
    return value, base * left[1] + by_exponent * right[1]


_OPERATORS: dict[type[ast.operator], Callable[[Dual, Dual], Dual]] = {
    ast.Add: lambda a, b: (a[0] + b[0], a[1] + b[1]),
    ast.Sub: lambda a, b: (a[0] - b[0], a[1] - b[1]),
    ast.Mult: lambda a, b: (a[0] * b[0], a[0] * b[1] + b[0] * a[1]),
    ast.Div: lambda a, b: (a[0] / b[0], (a[1] - a[0] / b[0] * b[1]) / b[0]),
    ast.Pow: _power,
}
_FUNCTIONS: dict[str, tuple[int, Callable[..., Dual]]] = {
    "exp": (1, lambda a: (np.exp(a[0]), np.exp(a[0]) * a[1])),
    "log": (1, lambda a: (np.log(a[0]), a[1] / a[0])),
    "sqrt": (1, lambda a: (np.sqrt(a[0]), a[1] / (2 * np.sqrt(a[0])))),
    "min": (2, lambda a, b: (np.minimum(a[0], b[0]), np.where(a[0] <= b[0], a[1], b[1]))),
    "max": (2, lambda a, b: (np.maximum(a[0], b[0]), np.where(a[0] >= b[0], a[1], b[1]))),
}


@dataclass(frozen=True)
class Form:
    """A parsed expression; its constants in the order of their first appearance."""

    text: str
    tree: ast.expr
    constants: tuple[str, ...]
    exponents: frozenset[str]
    """Constants that stand in an exponent."""
    variables: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Form:
        """The form of an expression, or of a name in `NAMED`.

        Raises:
            UserError: What cannot be parsed or is not allowed, at which place.
        """
        text = NAMED.get(text.strip(), text).replace("^", "**")
        try:
            tree = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            place = f" at character {error.offset}" if isinstance(error, SyntaxError) else ""
            raise UserError(f"--form cannot parse {text!r}{place}", "command line", _FIX) from None
        names: dict[str, None] = {}
        exponents: set[str] = set()
        _check(tree, text, names, exponents, False)
        constants = tuple(name for name in names if name not in VARIABLES)
        variables = frozenset(names) & frozenset(VARIABLES)
        if not variables or not constants:
            raise UserError(f"--form {text!r} has no {'constant' if variables else 'N or D'}", "command line", _FIX)
        if len(constants) > MAX_CONSTANTS:
            raise UserError(
                f"--form has {len(constants)} constants, at most {MAX_CONSTANTS} can be fitted", "command line", _FIX
            )
        return cls(text, tree, constants, frozenset(exponents), variables)

    def value(self, logs: FloatArray, data: Mapping[str, FloatArray], derivatives: bool = True) -> Dual:
        """The loss and its derivatives by the logarithms of the constants.

        Args:
            logs: Shape (R, k), logarithms of the constants.
            data: The variables, shape (n,) or (R, n).
            derivatives: Whether they are wanted.

        Returns:
            Shapes (R, n) and (k, R, n), or (0, R, n); not finite where the expression is not.
        """
        count = len(self.constants) if derivatives else 0
        known: dict[str, Dual] = {name: (column, np.zeros((1, 1, 1))) for name, column in data.items()}
        for i, name in enumerate(self.constants):
            own = np.exp(logs[:, i : i + 1])
            slope = np.zeros((count, len(logs), 1))
            slope[i : i + 1] = own
            known[name] = own, slope
        with np.errstate(all="ignore"):
            value, slope = _evaluate(self.tree, known)
        shape = np.broadcast_shapes(value.shape, (len(logs), 1))
        return np.broadcast_to(value, shape), np.broadcast_to(slope, (count, *shape))

    def loss(self, logs: FloatArray, params: npt.ArrayLike, tokens: npt.ArrayLike, unique: npt.ArrayLike) -> FloatArray:
        """The loss at (N, D) with so many unique tokens, shape (R, n)."""
        d = np.asarray(tokens, dtype=np.float64)
        data = {"N": np.asarray(params, dtype=np.float64), "D": d, "U": np.minimum(unique, d)}
        return np.asarray(self.value(np.atleast_2d(logs), data, derivatives=False)[0])

    def optimum(self, logs: FloatArray, flops: float, unique: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """N*, D* and the loss there at C = 6 N D, each of shape (R,); NaN where the lowest loss is at no N inside."""
        middle = np.sqrt(flops / FLOPS_PER_PARAMETER_TOKEN)
        x = np.log(np.geomspace(middle * _LOW, middle * _HIGH, _GRID))
        losses = self.loss(logs, np.exp(x), np.exp(2 * np.log(middle) - x), unique)
        losses = np.where(np.isfinite(losses), losses, np.inf)
        best = np.argmin(losses, axis=1)
        inside = (best > 0) & (best < _GRID - 1)
        at = np.clip(best, 1, _GRID - 2)
        rows = np.arange(len(losses))
        low, here, high = (losses[rows, at + step] for step in (-1, 0, 1))
        with np.errstate(all="ignore"):
            shift = np.clip(0.5 * (low - high) / (low - 2 * here + high), -0.5, 0.5)
        ln_n = np.where(inside, x[at] + np.nan_to_num(shift) * (x[1] - x[0]), np.nan)
        n, d = np.exp(ln_n), np.exp(2 * np.log(middle) - ln_n)
        return n, d, self.loss(logs, n[:, None], d[:, None], unique)[:, 0]

    @cached_property
    def needs_unique(self) -> bool:
        """Whether the form has U."""
        return "U" in self.variables


def form_path(one: Mapping[str, Any], flops: FloatArray) -> dict[str, tuple[FloatArray, FloatArray, FloatArray]]:
    """N*, D* and the loss of an own form along a path of budgets, each with the ends of its 95 % interval."""
    form = Form.parse(one["expression"])
    logs = np.concatenate([[one["ln_constants"]], unpack(one["replicates"])[:_PATH_REPLICATES]])
    unique = one["unique_tokens"] or math.inf
    found = np.array([form.optimum(logs, float(c), unique) for c in flops])
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(found[:, :, 1:], [0.025, 0.975], axis=2)
    return {name: (found[:, i, 0], low[:, i], high[:, i]) for i, name in enumerate(("params", "tokens", "loss"))}


def _check(node: ast.AST, text: str, names: dict[str, None], exponents: set[str], above: bool) -> None:
    """Walk the tree, refuse what is not allowed, and collect names; `above`: within an exponent."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and abs(number) < 1e300:
            return
        case ast.Name(id=name):
            names[name] = None
            if above and name not in VARIABLES:
                exponents.add(name)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=inner):
            _check(inner, text, names, exponents, above)
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS:
            _check(left, text, names, exponents, above)
            _check(right, text, names, exponents, above or isinstance(operator, ast.Pow))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            if len(args) != _FUNCTIONS[name][0]:
                raise UserError(f"--form: {name} takes {_FUNCTIONS[name][0]} values", "command line", _FIX)
            for one in args:
                _check(one, text, names, exponents, above)
        case _:
            part = ast.get_source_segment(text, node) or text
            raise UserError(
                f"--form does not allow {part!r}", "command line",
                f"use N, D, U, constants, + - * / ** and {', '.join(_FUNCTIONS)}",
            )  # fmt: skip


def _evaluate(node: ast.AST, known: Mapping[str, Dual]) -> Dual:
    match node:
        case ast.Constant(value=number):
            return np.array([[float(number)]]), np.zeros((1, 1, 1))  # type: ignore[arg-type]
        case ast.Name(id=name):
            return known[name]
        case ast.UnaryOp(op=sign, operand=inner):
            value, slope = _evaluate(inner, known)
            return (-value, -slope) if isinstance(sign, ast.USub) else (value, slope)
        case ast.BinOp(left=left, op=operator, right=right):
            return _OPERATORS[type(operator)](_evaluate(left, known), _evaluate(right, known))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name][1](*(_evaluate(one, known) for one in args))
    raise AssertionError(node)
