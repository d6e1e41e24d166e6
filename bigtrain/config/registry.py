"""Registries of the implementations of extension points, by name: the built-in ones and those of plugins.

Each built-in implementation is a file in the folder of its extension point. The file has the implementation's name, and
is imported only when the implementation is used. The classes of plugins are registered by the same decorator:

    @OPTIMIZERS.register
    class MyOptimizer(OptimizerConfig):
        name: Literal["mine"] = "mine"

If a registry annotates a field of a section, it validates the field as the implementation that the field's value names:

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
"""All registries by the name of their extension point."""

_recording: ContextVar[list[Registered] | None] = ContextVar("recording", default=None)


class Registered(typing.NamedTuple):
    """A class that a plugin has registered, with its extension point and name."""

    point: str
    name: str
    value: type


class Registry(Generic[T]):
    """The implementations of one extension point, by name.

    Args:
        point: Name of the extension point in messages: "optimizer".
        base: The class that every implementation inherits.
        package: Dotted name of the package of the built-in implementations; None: there are none.
        folders: True: each implementation is a subpackage of `package`, with its section in config.py. False: it is a
            module. None: it is either, with its class in the module or in the subpackage's `__init__.py`.
        tag: The field of a section that holds its name. None: implementations are not sections, and their class
            attribute `name` holds the name.
        default: The name of the implementation for a section that gives no name; None: the name is required.
        where: The YAML key that names an implementation, for messages; None: derived from `point` and `tag`.
        short: A key of the default implementation. A number in place of a mapping is short for a mapping with this key,
            and is written in place of a mapping that has no other key.
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
        short: str | None = None,
    ) -> None:
        self.point, self.base, self.package, self.tag, self.default = point, base, package, tag, default
        self.folders, self.short = folders, short
        self.where = where or f"{point}.{tag or 'name'}"
        self.found: dict[str, type[T]] = {}
        """The implementations imported or registered so far, by name."""
        self._own: dict[str, type[T]] = {}
        self._builtin: list[str] | None = None
        REGISTRIES[point] = self

    def register(self, value: type[T]) -> type[T]:
        """Add an implementation under its name; a class decorator.

        Raises:
            UserError: The class has no name, is not a subclass of the base, or has the name of a built-in
                implementation. A built-in class with `gives_way = True` may be replaced.
        """
        place = f"{value.__module__}.{value.__qualname__}"
        if not issubclass(value, self.base):
            fix = f"Write class {value.__name__}({self.base.__name__})."
            raise UserError(f"{value.__name__} is not a subclass of {self.base.__name__}", place, fix)
        name = self._name_of(value)
        if name is None:
            fix = f'Give it {self.tag}: Literal["my-name"] = "my-name".' if self.tag else 'Give it name = "my-name".'
            raise UserError(f"The {self.point} {value.__name__} has no name", place, fix)
        if name in self.builtin() and value.__module__ == self._module(name):
            self._own[name] = value
            self.found.setdefault(name, value)  # a plugin may already have registered the name
            return value
        if name in self.builtin() and not getattr(self._import(name), "gives_way", False):
            raise UserError(
                f"The name '{name}' of this {self.point} is already used by one of bigtrain's own",
                place,
                "Give it another name.",
            )
        self.found[name] = value
        recording = _recording.get()
        if recording is not None:
            recording.append(Registered(self.point, name, value))
        return value

    def _import(self, name: str) -> type[T] | None:
        """Import the built-in implementation with this name."""
        importlib.import_module(self._module(name))
        return self._own.get(name)

    def replace(self, name: str, value: type[T]) -> None:
        """Set the implementation of a name to a plugin's class that was registered under it before."""
        self.found[name] = value

    def with_default(self, name: str) -> Registry[T]:
        """A copy of the registry with another default name, for a field in which the name is optional."""
        registry = copy.copy(self)
        registry.default = name
        return registry

    def has_name(self, value: type) -> bool:
        """Whether a class defines the name under which it would be registered."""
        return self._name_of(value) is not None

    def get(self, value: type) -> type[T] | None:
        """The implementation registered under the name of a class; None if there is none."""
        name = self._name_of(value)
        return None if name is None else self.found.get(name)

    def builtin(self) -> list[str]:
        """The names of the built-in implementations, found without importing them."""
        if self._builtin is None:
            self._builtin = [] if self.package is None else sorted(_modules(self.package, self.folders))
        return self._builtin

    def names(self) -> list[str]:
        """The names of all implementations, first the built-in ones, then those of plugins."""
        return [*self.builtin(), *sorted(set(self.found) - set(self.builtin()))]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.found or name in self.names())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> type[T]:
        """The implementation of a name.

        Raises:
            UserError: There is none; the message lists the known names and suggests the most similar one.
        """
        if name not in self.found and name in self.builtin() and (value := self._import(name)) is not None:
            self.found[name] = value
        if name not in self.found:
            close = nearest(name, self.names())
            hint = f"Did you mean '{close}'? " if close else ""
            own = "Add one of your own with --plugin FILE."
            raise UserError(
                f"Unknown {self.point} '{name}'", self.where, f"{hint}Known: {', '.join(self.names())}. {own}"
            )
        return self.found[name]

    def read(self, value: Mapping[str, Any]) -> T:
        """Validate a mapping as the section that the name in it selects.

        Raises:
            UserError: There is no implementation with this name.
            pydantic.ValidationError: A key or value is wrong.
        """
        assert self.tag is not None
        section: Any = self[str(value.get(self.tag, self.default))]
        return section.model_validate(dict(value))

    def choose(self, value: Any) -> type[T] | None:
        """The implementation that the name in a YAML mapping selects; None if the name is missing or unknown."""
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

    # pydantic calls these methods on annotations.

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(self._dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number: list[JsonSchemaValue] = [] if self.short is None else [{"type": "number"}]
        return {"anyOf": [*number, *(self._schema_of(name, handler) for name in self.names())]}

    def _schema_of(self, name: str, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        section: Any = self[name]
        value = handler(section.__pydantic_core_schema__)
        if name != self.default and self.tag is not None:
            # A mapping without a name selects the default, so all other implementations require the name.
            handler.resolve_ref_schema(value).setdefault("required", []).append(self.tag)
        return value

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        if isinstance(value, self.base):
            return value
        if self.short is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = {self.short: value}
        if not isinstance(value, dict):
            number = "" if self.short is None else "a number or "
            raise PydanticCustomError("registry_type", "input should be {number}a mapping of keys", {"number": number})
        assert self.tag is not None
        name = value.get(self.tag, self.default)
        if name is None:
            raise PydanticCustomError(
                "missing_name", "the key '{tag}' is missing: use one of {names}", self._context(name)
            )
        if name not in self:
            raise PydanticCustomError("unknown_name", "unknown {point} '{name}'", self._context(name))
        section: Any = self[str(name)]
        complete = {**value, self.tag: name}
        if info.mode == "json":
            return section.model_validate_json(json.dumps(complete), strict=True)
        return section.model_validate(complete)

    def _dump(self, value: Any, info: core_schema.SerializationInfo) -> Any:
        plain = value.model_dump(mode=info.mode)
        is_short = self.short is not None and plain.keys() == {self.tag, self.short}
        return plain[self.short] if is_short and plain[self.tag] == self.default else plain

    def _context(self, name: object) -> dict[str, Any]:
        close = nearest(str(name), self.names()) or ""
        names = ", ".join(self.names())
        return {"tag": self.tag, "point": self.point, "name": str(name), "nearest": close, "names": names}


@contextmanager
def recorded() -> Iterator[list[Registered]]:
    """Collect the classes that are registered in the `with` block, which loads a plugin."""
    found: list[Registered] = []
    token = _recording.set(found)
    try:
        yield found
    finally:
        _recording.reset(token)


def _modules(package: str, folders: bool | None) -> Iterator[str]:
    """The names of the modules or subpackages of a package, without those that begin with an underscore."""
    parent, _, _ = package.rpartition(".")
    if parent and parent not in sys.modules:
        importlib.import_module(parent)
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    for module in pkgutil.iter_modules(spec.submodule_search_locations):
        if folders in (None, module.ispkg) and not module.name.startswith("_"):
            yield module.name
