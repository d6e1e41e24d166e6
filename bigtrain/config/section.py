"""The base class of all config sections: frozen, typed, documented parts of the YAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class PluginSource:
    """Origin and hash of a plugin's source code."""

    place: str
    """The value of `--plugin`: an absolute path, or the name of a module."""
    sha256: str
    """SHA-256 of the plugin's source, in hexadecimal."""


class Section(BaseModel):
    """A typed part of a config. Unknown keys are refused, values are frozen, and fields have docstrings.

    The class of a section is defined in a module that does not import torch, in the package of the object that it
    builds. Its method `build()` imports that object's module.
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
    """The plugin that defines the section; None for built-in sections."""

    def plain(self) -> dict[str, Any]:
        """The section as plain YAML values, including all defaults."""
        return self.model_dump(mode="json")
