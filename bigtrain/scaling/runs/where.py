"""`--where`: comparisons of columns joined by "and", "or" and "not", which are parsed and never evaluated as code.

    expression := term ("or" term)*            term := factor ("and" factor)*
    factor     := "not" factor | "(" expression ")" | comparison
    comparison := sum SIGN sum (SIGN sum)*     sum, product: + - * / of columns, numbers and parentheses

A word that is not the name of a column is a text, if it is on the right-hand side: `phase == decayed`. Columns whose
names contain other characters than letters, digits and _ are recognised by their whole name, or may be quoted.

A comparison with a missing value is neither true nor false, as in SQL: `lr < 1` and `not lr < 1` both drop the row, and
the table's notes give the number of such rows. `lr == ""` is true for the rows without a value.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from bigtrain.config import UserError, nearest
from bigtrain.scaling.runs.numbers import parse_number
from bigtrain.scaling.runs.table import RunTable, texts

_TOKEN = re.compile(
    r"""\s*(?:(?P<sign><=|>=|==|!=|=|<|>)|(?P<join>&&|\|\|)|(?P<mark>[-+*/()])|"(?P<double>[^"]*)"|'(?P<single>[^']*)'
        |(?P<number>(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[kKmMbBgGtT]?(?![\w.]))|(?P<word>[^\s<>=!()"'&|+*/]+))""",
    re.VERBOSE,
)
_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "=": operator.eq,
    "!=": operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
_JOINS = {"&&": "and", "||": "or"}
_OWN = ("params", "tokens", "flops", "loss", "run", "group", "phase", "seed")
_EXAMPLE = 'Write comparisons joined by "and" and "or", such as --where "flops < 1e21 and phase == decayed"'
_WORD = re.compile(r"\w")
_SHOWN = 8
_UNKNOWN = 0.5
"""Truth value of a comparison with a missing value, between false (0) and true (1). In this logic (Kleene's) "and" is
the minimum, "or" the maximum, and "not x" is 1 - x."""


@dataclass(frozen=True)
class _Token:
    kind: Literal["sign", "join", "mark", "text", "number", "column", "end"]
    text: str


@dataclass(frozen=True)
class _Value:
    """One side of a comparison: numbers, a text, or a column, which may be compared as numbers or as texts."""

    numbers: np.ndarray | None
    """The numbers of all rows, shape (n,), or one number, shape (); None for a text or a column without numbers."""
    text: str | None = None
    """The text or number as written; None for a column or a computed value."""
    column: str | None = None
    """Name of the column; None for other values."""


def where(table: RunTable, expression: str) -> RunTable:
    """The rows of a table for which an expression is true.

    Args:
        table: The runs.
        expression: For example `(tokens / params > 20 or phase == decayed) and flops < 1e21`. Names are params,
            tokens, flops, loss, run, group, phase, seed, or the columns of the source.

    Raises:
        UserError: The expression cannot be parsed, a column is missing, or no row has a text that a column is compared
            with.
    """
    parser = _Parser(table, expression)
    truth = np.broadcast_to(parser.expression(), (len(table),))
    parser.expect("end")
    kept = table.take(truth == 1.0)
    if not (unknown := truth == _UNKNOWN).any():
        return kept
    named = ", ".join(parser.absent_in(unknown)) or "a quotient"
    return replace(kept, notes=(*kept.notes, f"--where drops {unknown.sum()} rows that have no value of: {named}"))


class _Parser:
    def __init__(self, table: RunTable, expression: str) -> None:
        self._table, self._text = table, expression
        own = [name for name in _OWN if len(getattr(table, name)) == len(table)]
        self._columns = list(dict.fromkeys([*own, *table.raw]))
        self._own = set(own)
        self._tokens = self._split(expression)
        self._at = 0

    def expression(self) -> np.ndarray:
        """Parse an expression; returns its truth value for each row, shape (n,)."""
        found = self._term()
        while self._is("join", "or"):
            self._at += 1
            found = np.maximum(found, self._term())
        return found

    def absent_in(self, rows: np.ndarray) -> list[str]:
        """Names of the expression's columns that lack a value in any of the rows of a boolean mask."""
        names = dict.fromkeys(token.text for token in self._tokens if token.kind == "column")
        return [name for name in names if (self._is_absent(name) & rows).any()]

    def _is_absent(self, name: str) -> np.ndarray:
        numbers = self._column(name)
        empty = self._texts(_Value(None, None, name)) == ""
        return empty if numbers is None else np.isnan(numbers)

    def expect(self, kind: str, text: str | None = None) -> None:
        """Consume one token of the given kind and text; any other token is an error."""
        token = self._tokens[self._at]
        if token.kind != kind or (text is not None and token.text != text):
            raise self._error(token.text)
        self._at += 1

    def _term(self) -> np.ndarray:
        found = self._factor()
        while self._is("join", "and"):
            self._at += 1
            found = np.minimum(found, self._factor())
        return found

    def _factor(self) -> np.ndarray:
        if self._is("join", "not"):
            self._at += 1
            return 1.0 - self._factor()
        if self._is("mark", "("):
            begin = self._at
            try:
                return self._comparison()
            except UserError:
                # The parenthesis does not enclose a sum but a condition.
                self._at = begin + 1
            found = self.expression()
            self.expect("mark", ")")
            return found
        return self._comparison()

    def _comparison(self) -> np.ndarray:
        left = self._sum(first=True)
        if self._tokens[self._at].kind != "sign":
            raise self._error(self._tokens[self._at].text)
        found = np.ones(len(self._table))
        while self._tokens[self._at].kind == "sign":
            sign = self._tokens[self._at].text
            self._at += 1
            right = self._sum(first=False)
            found = np.minimum(found, self._holds(left, sign, right))
            left = right
        return found

    def _sum(self, first: bool) -> _Value:
        return self._chain(lambda: self._chain(lambda: self._atom(first), ("*", "/")), ("+", "-"))

    def _chain(self, part: Callable[[], _Value], marks: tuple[str, ...]) -> _Value:
        found = part()
        while self._tokens[self._at].kind == "mark" and self._tokens[self._at].text in marks:
            mark = self._tokens[self._at].text
            self._at += 1
            other = part()
            with np.errstate(divide="ignore", invalid="ignore"):
                found = _Value(np.asarray(_ARITHMETIC[mark](self._numeric(found), self._numeric(other))))
        return found

    def _atom(self, first: bool) -> _Value:
        token = self._tokens[self._at]
        self._at += 1
        if token.kind == "number":
            number = parse_number(token.text)
            assert number is not None
            return _Value(np.asarray(number), token.text)
        if token.kind == "column":
            return _Value(self._column(token.text), None, token.text)
        if token.kind == "mark" and token.text in ("(", "-", "+"):
            inner = self._sum(first) if token.text == "(" else self._atom(first)
            if token.text != "(":
                return _Value(-self._numeric(inner) if token.text == "-" else self._numeric(inner))
            self.expect("mark", ")")
            return inner
        if token.kind == "text" and not first:
            return _Value(None, token.text)
        raise self._unknown(token.text) if token.kind == "text" else self._error(token.text)

    def _column(self, name: str) -> np.ndarray | None:
        column: Any = getattr(self._table, name) if name in self._own else self._table.raw[name]
        values = [parse_number(value) for value in column]
        if all(value is None for value in values):
            return None
        return np.array([np.nan if value is None else value for value in values])

    def _numeric(self, value: _Value) -> np.ndarray:
        if value.numbers is None:
            raise UserError(f"--where cannot calculate with {value.text or value.column!r}", "command line", _EXAMPLE)
        return value.numbers

    def _holds(self, left: _Value, sign: str, right: _Value) -> np.ndarray:
        if left.numbers is not None and right.numbers is not None:
            if not left.numbers.ndim and not right.numbers.ndim:
                raise UserError(f"--where compares no column in {self._text!r}", "command line", _EXAMPLE)
            absent = np.isnan(left.numbers) | np.isnan(right.numbers)
            return np.where(absent, _UNKNOWN, _SIGNS[sign](left.numbers, right.numbers))
        if sign not in ("==", "=", "!="):
            raise UserError(f"--where compares texts by {sign} in {self._text!r}", "command line", _EXAMPLE)
        one, other = self._texts(left), self._texts(right)
        found = np.asarray(one == other)
        if right.text is not None and left.column is not None and not found.any():
            known = list(dict.fromkeys(f'"{value}"' if " " in value else value for value in one.tolist() if value))
            raise UserError(
                f"No row has {left.column} == {right.text}", self._table.source,
                f"The values are {', '.join(known[:_SHOWN])}{', ...' if len(known) > _SHOWN else ''}",
            )  # fmt: skip
        # An empty text that is written in the expression is a value like any other.
        absent = (one == "") | (other == "") if "" not in (left.text, right.text) else np.zeros_like(found)
        return np.where(absent, _UNKNOWN, ~found if sign == "!=" else found)

    def _texts(self, value: _Value) -> np.ndarray:
        if value.column is None:
            return np.array(value.text)
        column: Any = getattr(self._table, value.column) if value.column in self._own else self._table.raw[value.column]
        return np.array(texts(column))

    def _is(self, kind: str, text: str) -> bool:
        token = self._tokens[self._at]
        return token.kind == kind and token.text == text

    def _split(self, expression: str) -> list[_Token]:
        odd = sorted((name for name in self._columns if not re.fullmatch(r"\w+", name)), key=len, reverse=True)
        tokens: list[_Token] = []
        at = 0
        while at < len(expression.rstrip()):
            at += len(expression[at:]) - len(expression[at:].lstrip())
            whole = next(
                (
                    name
                    for name in odd
                    if expression.startswith(name, at) and not _WORD.match(expression, at + len(name))
                ),
                None,
            )
            if whole is not None:
                tokens.append(_Token("column", whole))
                at += len(whole)
                continue
            match = _TOKEN.match(expression, at)
            if match is None:
                raise self._error(expression[at:])
            tokens.append(self._token(match))
            at = match.end()
        return [*tokens, _Token("end", "the end")]

    def _token(self, match: re.Match[str]) -> _Token:
        kind = match.lastgroup or ""
        text = match.group(kind)
        if kind == "join":
            return _Token("join", _JOINS[text])
        if kind == "word" and text.lower() in ("and", "or", "not"):
            return _Token("join", text.lower())
        if kind in ("word", "double", "single"):
            return _Token("column" if text in self._columns else "text", text)
        return _Token(kind, text)  # type: ignore[arg-type]

    def _error(self, at: str) -> UserError:
        return UserError(f"--where cannot parse {self._text!r} at {at!r}", "command line", _EXAMPLE)

    def _unknown(self, name: str) -> UserError:
        close = nearest(name, self._columns)
        return UserError(
            f"--where names a column '{name}' that does not exist", self._table.source,
            f"Did you mean '{close}'?" if close else f"The columns are {', '.join(self._columns)}.",
        )  # fmt: skip
