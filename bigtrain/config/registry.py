"""The implementations of one extension point, by name: bigtrain's own and those that a user brings.

bigtrain's own lie one file each in a folder of their own. The file is named after the implementation, and it is
imported only when the implementation is chosen. A plugin's classes register by the same decorator:

    @OPTIMIZERS.register
    class MyOptimizer(OptimizerConfig):
        name: Literal["mine"] = "mine"

As an annotation of a section's field, a registry validates the field by the name in it:

    optimizer: Annotated[OptimizerConfig, OPTIMIZERS] = AdamWConfig()
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import pkgutil
import sys
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from pydantic.annotated_handlers import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from bigtrain.config.errors import UserError, nearest

T = TypeVar("T")

REGISTRIES: dict[str, Registry[Any]] = {}
"""Every extension point by its name: documentation and tests walk them all."""

_recording: ContextVar[list[Registered] | None] = ContextVar("recording", default=None)


class Registered(typing.NamedTuple):
    """What a plugin has registered."""

    point: str
    name: str
    value: type


class Registry(Generic[T]):
    """One extension point.

    Args:
        point: What an implementation is called in messages: "optimizer".
        base: The class that every implementation inherits.
        package: The folder of bigtrain's own implementations, as a dotted name.
        folders: Whether an implementation is a folder of `package`, with its section in config.py, and not a file.
            None: either one, with its class in the file or in the folder itself.
        tag: The field of a section that holds its name; None where implementations are no sections: their class
            attribute `name` holds it.
        default: The name that a section without one gets.
        where: The key of the YAML that names an implementation, for messages.
    """

    def __init__(
        self,
        point: str,
        base: type[T],
        package: str | None = None,
        *,
        folders: bool | None = False,
        tag: str | None = "name",
        default: str | None = None,
        where: str | None = None,
    ) -> None:
        self.point, self.base, self.package, self.tag, self.default = point, base, package, tag, default
        self.folders = folders
        self.where = where or f"{point}.{tag or 'name'}"
        self.found: dict[str, type[T]] = {}
        """What was imported or registered so far."""
        self._own: dict[str, type[T]] = {}
        self._builtin: list[str] | None = None
        REGISTRIES[point] = self

    def register(self, value: type[T]) -> type[T]:
        """Add an implementation under its name; a class decorator.

        Raises:
            UserError: It has no name, is no subclass of the base, or has the name of one of bigtrain's own that does
                not give way: one whose class says `gives_way` is replaced by a plugin's.
        """
        place = f"{value.__module__}.{value.__qualname__}"
        if not issubclass(value, self.base):
            fix = f"Write class {value.__name__}({self.base.__name__})."
            raise UserError(f"{value.__name__} is no {self.point}", place, fix)
        name = self._name_of(value)
        if name is None:
            fix = f'Give it {self.tag}: Literal["my-name"] = "my-name".' if self.tag else 'Give it name = "my-name".'
            raise UserError(f"The {self.point} {value.__name__} has no name", place, fix)
        if name in self.builtin() and value.__module__ == self._module(name):
            self._own[name] = value
            self.found.setdefault(name, value)  # a plugin may have the name already
            return value
        if name in self.builtin() and not getattr(self._import(name), "gives_way", False):
            raise UserError(
                f"The name '{name}' of this {self.point} is that of one of bigtrain's own", place, "Give it another."
            )
        self.found[name] = value
        recording = _recording.get()
        if recording is not None:
            recording.append(Registered(self.point, name, value))
        return value

    def _import(self, name: str) -> type[T] | None:
        """bigtrain's own implementation of a name."""
        importlib.import_module(self._module(name))
        return self._own.get(name)

    def replace(self, name: str, value: type[T]) -> None:
        """Let a name stand for a plugin's implementation that was registered under it before."""
        self.found[name] = value

    def with_default(self, name: str) -> Registry[T]:
        """A copy of the registry with another default name, for a field whose section need not give a name."""
        registry = copy.copy(self)
        registry.default = name
        return registry

    def has_name(self, value: type) -> bool:
        """Whether a class carries the name that it would be registered under."""
        return self._name_of(value) is not None

    def get(self, value: type) -> type[T] | None:
        """What is registered under the name of a class."""
        name = self._name_of(value)
        return None if name is None else self.found.get(name)

    def builtin(self) -> list[str]:
        """The names of bigtrain's own implementations; nothing is imported."""
        if self._builtin is None:
            self._builtin = [] if self.package is None else sorted(_modules(self.package, self.folders))
        return self._builtin

    def names(self) -> list[str]:
        """All names: bigtrain's own first, then those of plugins."""
        return [*self.builtin(), *sorted(set(self.found) - set(self.builtin()))]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.found or name in self.names())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> type[T]:
        """The implementation of a name.

        Raises:
            UserError: There is none; says which are known, and the nearest.
        """
        if name not in self.found and name in self.builtin() and (value := self._import(name)) is not None:
            self.found[name] = value
        if name not in self.found:
            close = nearest(name, self.names())
            hint = f"Did you mean '{close}'? " if close else ""
            own = "One of your own comes with --plugin FILE."
            raise UserError(
                f"Unknown {self.point} '{name}'", self.where, f"{hint}Known: {', '.join(self.names())}. {own}"
            )
        return self.found[name]

    def read(self, value: Mapping[str, Any]) -> T:
        """The section that a mapping describes, by the name in it.

        Raises:
            UserError: There is no implementation of that name.
            pydantic.ValidationError: A key or value is wrong.
        """
        assert self.tag is not None
        section: Any = self[str(value.get(self.tag, self.default))]
        return section.model_validate(dict(value))

    def choose(self, value: Any) -> type[T] | None:
        """The implementation that the mapping `value` of a YAML names; None where it names none that is known."""
        name = value.get(self.tag, self.default) if isinstance(value, dict) else None
        return self[name] if isinstance(name, str) and name in self else None

    def _module(self, name: str) -> str:
        return f"{self.package}.{name}.config" if self.folders else f"{self.package}.{name}"

    def _name_of(self, value: type) -> str | None:
        if self.tag is None:
            return getattr(value, "name", None)
        field = value.model_fields.get(self.tag) if issubclass(value, BaseModel) else None
        choices = typing.get_args(field.annotation) if field is not None else ()
        return str(choices[0]) if len(choices) == 1 else None

    # What pydantic asks of an annotation.

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [self._schema_of(name, handler) for name in self.names()]}

    def _schema_of(self, name: str, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        section: Any = self[name]
        value = handler(section.__pydantic_core_schema__)
        if name != self.default and self.tag is not None:
            # Without its name a mapping is the default's.
            handler.resolve_ref_schema(value).setdefault("required", []).append(self.tag)
        return value

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        if isinstance(value, self.base):
            return value
        if not isinstance(value, dict):
            raise PydanticCustomError("model_type", "input should be a mapping of keys")
        assert self.tag is not None
        name = value.get(self.tag, self.default)
        if name is None:
            raise PydanticCustomError("missing_name", "the key '{tag}' is missing: one of {names}", self._context(name))
        if name not in self:
            raise PydanticCustomError("unknown_name", "unknown {point} '{name}'", self._context(name))
        section: Any = self[str(name)]
        complete = {**value, self.tag: name}
        if info.mode == "json":
            return section.model_validate_json(json.dumps(complete), strict=True)
        return section.model_validate(complete)

    def _context(self, name: object) -> dict[str, Any]:
        close = nearest(str(name), self.names()) or ""
        names = ", ".join(self.names())
        return {"tag": self.tag, "point": self.point, "name": str(name), "nearest": close, "names": names}


@contextmanager
def recorded() -> Iterator[list[Registered]]:
    """Collect what is registered inside: what a plugin brings."""
    found: list[Registered] = []
    token = _recording.set(found)
    try:
        yield found
    finally:
        _recording.reset(token)


def _dump(value: Any, info: core_schema.SerializationInfo) -> Any:
    return value.model_dump(mode=info.mode)


def _modules(package: str, folders: bool | None) -> Iterator[str]:
    """The names of the files, or of the folders, of a package."""
    parent, _, _ = package.rpartition(".")
    if parent and parent not in sys.modules:
        importlib.import_module(parent)
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    for module in pkgutil.iter_modules(spec.submodule_search_locations):
        if folders in (None, module.ispkg) and not module.name.startswith("_"):
            yield module.name
