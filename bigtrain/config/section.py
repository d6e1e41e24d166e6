"""The base of every configurable thing: a frozen, typed, documented section of the YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class PluginSource:
    """Where the user's own code comes from."""

    place: str
    """What `--plugin` names it by: an absolute path, or a module."""
    sha256: str
    """Of its source."""


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

    plugin: ClassVar[PluginSource | None] = None
    """The user's code that defines the section; None for bigtrain's own."""

    def plain(self) -> dict[str, Any]:
        """The section as plain YAML values, every default written out."""
        return self.model_dump(mode="json")
