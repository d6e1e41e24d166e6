"""Quantities with units, as written in YAML: "512k tokens", "15 min", "20 GB"."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

_QUANTITY = re.compile(
    r"\s*([0-9][0-9_]*+(?:\.[0-9]*+)?(?:[eE][+-]?[0-9]++)?)(?:\s*([kMGT]i?+)(?![a-zA-Z]))?\s*(.*)", re.DOTALL
)
_FACTORS = {
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def split_quantity(text: str) -> tuple[float, str]:
    """Split a text such as "512k tokens" into its number, here 512000.0, and its unit.

    The suffixes k, M, G, T are powers of ten; ki, Mi, Gi, Ti are powers of two.

    Raises:
        ValueError: The text does not begin with a number, or the number is not finite.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a number with a unit")
    number, suffix, unit = match.groups()
    value = float(number.replace("_", "")) * _FACTORS.get(suffix or "", 1)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value, unit.strip()


def _whole(value: float, text: object) -> int:
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


class _Quantity(ABC):
    """Base of the quantities below, which are parsed from a YAML number or text and written as a text."""

    json_types: ClassVar[tuple[str, ...]] = ("string",)
    """The types that JSON Schema allows for the quantity."""

    @abstractmethod
    def __str__(self) -> str:
        """The quantity as a YAML text."""

    @classmethod
    @abstractmethod
    def parse(cls, value: Any) -> Any:
        """Parse the quantity from a YAML scalar."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(cls._plain)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": kind} for kind in cls.json_types], "description": cls.__doc__}

    def _plain(self) -> Any:
        return str(self)


_UNITS = {
    "step": "steps", "steps": "steps",
    "token": "tokens", "tokens": "tokens",
    "sample": "samples", "samples": "samples",
    "epoch": "epochs", "epochs": "epochs",
    "s": "seconds", "sec": "seconds", "second": "seconds", "seconds": "seconds",
    "min": "minutes", "minute": "minutes", "minutes": "minutes",
    "h": "hours", "hour": "hours", "hours": "hours",
}  # fmt: skip
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}


@dataclass(frozen=True)
class Duration(_Quantity):
    """A length of training with its unit: "2000 steps", "1e9 tokens", "3 epochs", "15 min"."""

    value: float
    unit: str

    @classmethod
    def steps(cls, value: int) -> Duration:
        """A duration in optimizer steps."""
        return cls(float(value), "steps")

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Parse "NUMBER UNIT"; a number without a unit is refused.

        Raises:
            ValueError: The unit is missing or unknown, or a number of steps, tokens or samples is not an integer.
        """
        if isinstance(value, Duration):
            return value
        if not isinstance(value, str):
            raise ValueError(f"{value!r} has no unit: write for example '{value} steps'")
        number, unit = split_quantity(value)
        if unit not in _UNITS:
            raise ValueError(
                f"{value!r} has {'no unit' if not unit else f'an unknown unit {unit!r}'}: "
                "use steps, tokens, epochs, s, min or h"
            )
        unit = _UNITS[unit]
        if unit in ("steps", "tokens", "samples"):
            number = _whole(number, value)
        return cls(float(number), unit)

    @property
    def is_time(self) -> bool:
        """Whether the unit is a unit of time."""
        return self.unit in _SECONDS

    @property
    def seconds(self) -> float:
        """The duration in seconds; only for units of time."""
        return self.value * _SECONDS[self.unit]

    def in_steps(self, tokens_per_step: int, sequences_per_step: int, sequences_per_epoch: int | None) -> int:
        """The duration in optimizer steps, rounded up; at least 0.

        Args:
            tokens_per_step: Tokens in a global batch.
            sequences_per_step: Sequences in a global batch.
            sequences_per_epoch: Sequences in an epoch of the data; None: unknown.

        Raises:
            ValueError: The duration has a unit of time, or is in epochs of unknown size.
        """
        if self.unit == "steps":
            return int(self.value)
        if self.unit == "tokens":
            return math.ceil(self.value / tokens_per_step)
        if self.unit == "samples":
            return math.ceil(self.value / sequences_per_step)
        if self.unit == "epochs":
            if sequences_per_epoch is None:
                raise ValueError("a duration in epochs needs data of known size")
            return math.ceil(self.value * sequences_per_epoch / sequences_per_step)
        raise ValueError(f"'{self}' is a time, which does not determine a number of steps")

    def __str__(self) -> str:
        number = repr(int(self.value)) if self.value == int(self.value) else repr(self.value)
        unit = self.unit[:-1] if number == "1" else self.unit
        return f"{number} {unit}"


@dataclass(frozen=True)
class BatchSize(_Quantity):
    """Size of the global batch, in sequences (12) or tokens ("512k tokens")."""

    json_types: ClassVar[tuple[str, ...]] = ("string", "integer")

    value: int
    unit: str = "sequences"

    @classmethod
    def parse(cls, value: Any) -> BatchSize:
        """Parse a number of sequences, or a text "N tokens" or "N sequences"."""
        if isinstance(value, BatchSize):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"{value!r} is not a batch size: give a number of sequences, or '512k tokens'")
        number, unit = split_quantity(str(value))
        unit = {"": "sequences", "sequence": "sequences", "token": "tokens"}.get(unit, unit)
        if unit not in ("sequences", "tokens"):
            raise ValueError(f"{value!r} has an unknown unit {unit!r}: use sequences or tokens")
        size = _whole(number, value)
        if size < 1:
            raise ValueError(f"{value!r} must be at least 1")
        return cls(size, unit)

    def sequences(self, context: int) -> int:
        """Number of sequences of `context` tokens in a global batch.

        Raises:
            ValueError: The size is in tokens and not a multiple of `context`.
        """
        if self.unit == "sequences":
            return self.value
        if self.value % context:
            lower = max(1, self.value // context) * context
            raise ValueError(
                f"{self.value} tokens are not a whole number of sequences of {context}; {lower} tokens would be"
            )
        return self.value // context

    def _plain(self) -> Any:
        return self.value if self.unit == "sequences" else str(self)

    def __str__(self) -> str:
        return f"{self.value} {self.unit}"


def parse_bytes(value: Any) -> Any:
    """Convert a text such as "20 GB" or "512 MiB" to a number of bytes; other types are returned unchanged."""
    if not isinstance(value, str):
        return value
    number, unit = split_quantity(value.strip().removesuffix("B"))
    if unit:
        raise ValueError(f"{value!r} is not a size: write for example '20 GB' or '512 MiB'")
    return _whole(number, value)


def _parse_count(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    number, unit = split_quantity(value)
    if unit:
        raise ValueError(f"{value!r} should be a plain number")
    return _whole(number, value)


class _NumberOrText:
    """Makes JSON Schema also allow a text (a number with a unit or suffix) for a number."""

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "string"}]}


NUMBER_OR_TEXT = _NumberOrText()

Bytes = Annotated[int, BeforeValidator(parse_bytes), NUMBER_OR_TEXT]
"""A number of bytes: 1000000, "20 GB", "512 MiB"."""

Count = Annotated[int, BeforeValidator(_parse_count), NUMBER_OR_TEXT]
"""An integer that may have a suffix: 65536, "64ki", "1M"."""
