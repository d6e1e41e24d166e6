"""Laws of the user's own form: expressions in N, D and constants, which are parsed and never evaluated as code.

    E + A / N**alpha + B / D**beta
    E + A / N**alpha + B / (U + U * R * (1 - exp((1 - D / U) / R)))**beta        "repeats"

N is the number of parameters, D of tokens, U of unique tokens (at most D). Every other name is a constant that is
fitted. Constants are positive; write a minus before one that lowers the loss. The operators are + - * / ** with
parentheses, the functions exp, log, sqrt, min and max. An expression is evaluated together with its derivatives by the
logarithm of each constant (forward-mode differentiation).

"repeats" is eq. 5 of Muennighoff et al. 2023. D tokens, which are D/U epochs of U unique tokens, have the effect of
D_eff = U + U R (1 - exp(-(D/U - 1) / R)) unique tokens. R is the number of repeats after which further repeats have
little effect; it is about 15 in that paper.
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
"""The forms that `--form` accepts by name."""
MAX_CONSTANTS = 12
_FIX = 'Write for example --form "E + A / N**alpha + B / D**beta"'
_GRID = 200
_PATH_REPLICATES = 200
_LOW, _HIGH = 1e-4, 1e4
"""Bounds of the search for N*, as multiples of the square root of C / 6."""
Dual = tuple[FloatArray, FloatArray]
"""A value and its derivatives, of shapes that broadcast to (R, n) and (k, R, n)."""


def _power(left: Dual, right: Dual) -> Dual:
    value = left[0] ** right[0]
    base = right[0] * left[0] ** (right[0] - 1)
    # The logarithm of the base, undefined for a base that is not positive, is needed only if the exponent is variable.
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
    """A parsed expression."""

    text: str
    tree: ast.expr
    constants: tuple[str, ...]
    """Names of the k constants, in the order of their first appearance."""
    exponents: frozenset[str]
    """Names of the constants that appear in an exponent."""
    variables: frozenset[str]
    """Those of N, D and U that appear."""

    @classmethod
    def parse(cls, text: str) -> Form:
        """Parse an expression, or a name in `NAMED`.

        Raises:
            UserError: The expression cannot be parsed, uses something that is not allowed, has no constant or no
                variable, or has too many constants.
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
            logs: Logarithms of the constants, shape (R, k).
            data: Values of the variables by name, each of shape (n,) or (R, n).
            derivatives: Whether to compute derivatives.

        Returns:
            The loss, shape (R, n), and its derivatives, shape (k, R, n), or (0, R, n) without them. Values are not
            finite where the expression is undefined.
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
        """The loss at (N, D), shape (R, n).

        Args:
            logs: Logarithms of the constants, shape (R, k) or (k,).
            params: N, shape (n,) or (R, n).
            tokens: D, shape (n,) or (R, n).
            unique: Unique tokens of the data; U is at most D.
        """
        d = np.asarray(tokens, dtype=np.float64)
        data = {"N": np.asarray(params, dtype=np.float64), "D": d, "U": np.minimum(unique, d)}
        return np.asarray(self.value(np.atleast_2d(logs), data, derivatives=False)[0])

    def optimum(self, logs: FloatArray, flops: float, unique: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """N*, D* and the loss there for C = 6 N D FLOPs, each of shape (R,).

        They are NaN where the lowest loss lies at the edge of the range of N that is searched.

        Args:
            logs: Logarithms of the constants, shape (R, k).
            flops: C.
            unique: Unique tokens of the data; infinity if no token is repeated.
        """
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
        """Whether the form contains U, so that the number of unique tokens must be known."""
        return "U" in self.variables


def form_path(one: Mapping[str, Any], flops: FloatArray) -> dict[str, tuple[FloatArray, FloatArray, FloatArray]]:
    """N*, D* and the loss of the user's own form at several budgets, with their 95 % intervals.

    Args:
        one: The form's part of law.json.
        flops: The budgets in FLOPs, shape (P,).

    Returns:
        Under "params", "tokens" and "loss" the values and both ends of their intervals, each of shape (P,).
    """
    form = Form.parse(one["expression"])
    logs = np.concatenate([[one["ln_constants"]], unpack(one["replicates"])[:_PATH_REPLICATES]])
    unique = one["unique_tokens"] or math.inf
    found = np.array([form.optimum(logs, float(c), unique) for c in flops])
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(found[:, :, 1:], [0.025, 0.975], axis=2)
    return {name: (found[:, i, 0], low[:, i], high[:, i]) for i, name in enumerate(("params", "tokens", "loss"))}


def _check(node: ast.AST, text: str, names: dict[str, None], exponents: set[str], above: bool) -> None:
    """Refuse expressions that are not allowed, and collect names.

    Args:
        node: The node of the syntax tree to check, with all nodes below it.
        text: The full expression, for messages.
        names: Collects all names, in the order of their appearance.
        exponents: Collects the constants that appear in an exponent.
        above: Whether the node lies within an exponent.
    """
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
                f"Use N, D, U, constants, + - * / ** and {', '.join(_FUNCTIONS)}.",
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
