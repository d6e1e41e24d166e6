"""The base of every configurable thing: a frozen, typed, documented section of the YAML."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A typed part of a config: unknown keys are refused, values are frozen, fields carry docstrings.

    A section's class lives in the torch-free `config.py` beside what it builds, and imports what it
    builds inside its own `build()`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=False,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def plain(self) -> dict[str, Any]:
        """The section as plain YAML values, every default written out."""
        return self.model_dump(mode="json")
