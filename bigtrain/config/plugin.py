"""Plugins: the user's own files and modules, which register implementations of extension points.

A plugin is loaded if `--plugin` names it, or if an installed package declares it as an entry point `bigtrain.plugins`.
A config never names code. The identity of a run includes the hash of each plugin whose classes its recipe uses. So a
resume without the plugin, or with a changed plugin, is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from bigtrain import variables
from bigtrain.config.errors import UserError
from bigtrain.config.registry import REGISTRIES, Registered, recorded
from bigtrain.config.section import PluginSource

ENTRY_POINTS: Final = "bigtrain.plugins"

ACTIVE: list[Plugin] = []
"""The result of the last call of `load_plugin`, as the only element; empty before the first call."""


@dataclass(frozen=True)
class Plugin:
    """One or several loaded plugins, and the classes that they have registered."""

    sources: tuple[PluginSource, ...]
    """The source of each plugin."""
    registered: tuple[Registered, ...]

    @property
    def place(self) -> str:
        """The argument by which `load_plugin` loads the same plugins again, also in another process."""
        return os.pathsep.join(source.place for source in self.sources)


def load_plugin(place: str) -> Plugin:
    """Execute plugins, each once in a process, and register the classes that they define.

    Args:
        place: A Python file, a directory with an `__init__.py`, or the dotted name of an installed module; several are
            joined by `os.pathsep`.

    Raises:
        UserError: A plugin does not exist, fails, or registers nothing; or two plugins register the same name.
    """
    loaded = [_load(*_resolved(one)) for one in place.split(os.pathsep) if one]
    registered = [one for plugin in loaded for one in plugin.registered]
    _refuse_twice(registered)
    for one in registered:
        # Another plugin, loaded in an earlier call, may have registered the same name.
        REGISTRIES[one.point].replace(one.name, one.value)
    whole = Plugin(tuple(source for plugin in loaded for source in plugin.sources), tuple(registered))
    ACTIVE[:] = [whole]
    return whole


def active_plugin() -> Plugin | None:
    """The result of the last call of `load_plugin` in this process; None if there was no call."""
    return ACTIVE[0] if ACTIVE else None


def plugin_environment() -> dict[str, str]:
    """The environment variable by which ranks load the plugins of this process; {} if there are none."""
    plugin = active_plugin()
    return {} if plugin is None else {variables.PLUGIN: plugin.place}


def plugin_of_launcher() -> Plugin | None:
    """Load the plugins that the launcher of this rank has loaded; None if there are none."""
    place = os.environ.get(variables.PLUGIN)
    return load_plugin(place) if place else None


@cache
def load_installed() -> tuple[Plugin, ...]:
    """Load the plugins that installed packages declare as entry points in the group `bigtrain.plugins`."""
    return tuple(_load(entry.module, False) for entry in importlib.metadata.entry_points(group=ENTRY_POINTS))


def _resolved(place: str) -> tuple[str, bool]:
    """A place with its path made absolute, and whether it is a path and not the name of a module."""
    path = Path(place).expanduser()
    is_path = path.suffix == ".py" or os.sep in place or path.exists()
    return (str(path.resolve()) if is_path else place), is_path


@cache
def _load(place: str, is_path: bool) -> Plugin:
    with recorded() as registered:
        module = _run_file(Path(place)) if is_path else _run_module(place)
        _register_families(module)
    if not registered:
        raise UserError(
            "The plugin registers nothing",
            place,
            "Register a class with the decorator of its extension point, such as @FAMILIES.register; see 'To add "
            "something' in bigtrain/README.md.",
        )
    source = PluginSource(place, _hash(module, place))
    for one in registered:
        one.value.plugin = source  # type: ignore[attr-defined]
    return Plugin((source,), tuple(registered))


def _register_families(module: ModuleType) -> None:
    """Register model families that were written without the decorator: classes that set their own `arch`."""
    families = REGISTRIES.get("model family")
    if families is None:
        return
    for value in list(vars(module).values()):
        own = (
            isinstance(value, type)
            and issubclass(value, families.base)
            and not value.__module__.startswith("bigtrain.")
        )
        if own and families.has_name(value) and families.get(value) is not value:
            families.register(value)


def _refuse_twice(registered: Iterable[Registered]) -> None:
    seen: dict[tuple[str, str], Any] = {}
    for one in registered:
        other = seen.setdefault((one.point, one.name), one.value)
        if other is not one.value:
            raise UserError(
                f"Two plugins register the {one.point} '{one.name}'",
                f"{other.plugin.place} and {one.value.plugin.place}",  # type: ignore[attr-defined]
                "Rename one of them.",
            )


def _run_file(path: Path) -> ModuleType:
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"There is no plugin {path}", "--plugin", "Name a .py file, a package's directory, or a module."
        )
    name = f"bigtrain_plugin_{path.stem}"
    folders = [str(path)] if path.is_dir() else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None  # a .py file has one
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise _failed(str(path), error) from error
    return module


def _run_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(
                f"There is no module '{name}'", "--plugin", "Name a .py file, a package's directory, or a module."
            ) from None
        raise _failed(name, error) from error
    except UserError:
        raise
    except Exception as error:
        raise _failed(name, error) from error


def _failed(place: str, error: Exception) -> UserError:
    """The error that a plugin raised an exception, with the line that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if len(frames) > 1 else place
    fix = None
    if isinstance(error, ModuleNotFoundError):
        fix = "A plugin of several files is a package: name its directory, and import with `from .other import ...`."
    return UserError(f"The plugin cannot be loaded: {type(error).__name__}: {error}", where, fix)


def source_hash(path: Path) -> str:
    """SHA-256, in hexadecimal, of a plugin's file, or of the paths and contents of all Python files of its package."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    whole = hashlib.sha256()
    for part in sorted(path.rglob("*.py")):
        whole.update(f"{part.relative_to(path)}\0{hashlib.sha256(part.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()


def _hash(module: ModuleType, place: str) -> str:
    if module.__file__ is None or not module.__file__.endswith(".py"):
        raise UserError("A plugin must be Python source, but this module has none", place)
    file = Path(module.__file__)
    return source_hash(file.parent if file.name == "__init__.py" else file)
