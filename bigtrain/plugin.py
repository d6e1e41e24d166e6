"""The user's own code: a file or module with model families, loaded where `--plugin` names it and nowhere else.

No config names code. What a plugin defines belongs to a run's identity by the hash of its source, and a run's record
says where it came from, so that a resume without it, or with a changed one, is refused by name.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from bigtrain import variables
from bigtrain.config import UserError
from bigtrain.models.config import ModelConfig, PluginSource, families


@dataclass(frozen=True)
class Plugin:
    """Code that was loaded, and the families that it defines."""

    source: PluginSource
    families: Mapping[str, type[ModelConfig]]
    """The classes `Config` by their `arch`."""


def load_plugin(place: str) -> Plugin:
    """Run the user's code, once a process, and find its model families.

    Args:
        place: A Python file, a directory with an `__init__.py`, or the dotted name of an installed module.

    Raises:
        UserError: It is not there, fails, or defines no family.
    """
    path = Path(place).expanduser()
    is_path = path.suffix == ".py" or os.sep in place or path.exists()
    return _load(str(path.resolve()) if is_path else place, is_path)


def plugin_of_launcher() -> Plugin | None:
    """The plugin that the launcher of this rank was given, if any."""
    place = os.environ.get(variables.PLUGIN)
    return load_plugin(place) if place else None


@cache
def _load(place: str, is_path: bool) -> Plugin:
    module = _run_file(Path(place)) if is_path else _run_module(place)
    source = PluginSource(place, _hash(module, place))
    found = {}
    for value in vars(module).values():
        arch = _arch(value)
        if arch is None:
            continue
        if arch in families():
            raise UserError(
                f"The plugin's arch '{arch}' is the name of a family of bigtrain's own", place, "Give it another."
            )
        # A class of its own, so that what the user has written stays as it is.
        found[arch] = type(value.__name__, (value,), {"__module__": value.__module__, "plugin": source})
    if not found:
        raise UserError(
            "The plugin defines no model family",
            place,
            "Define a class Config(PlainConfig) with arch: Literal[\"my-model\"]; see 'Your own module' in "
            "bigtrain/models/README.md.",
        )
    return Plugin(source, found)


def _arch(value: Any) -> str | None:
    """The arch of a family's class that is not one of bigtrain's own; None for everything else."""
    if not (isinstance(value, type) and issubclass(value, ModelConfig)) or value.__module__.startswith("bigtrain."):
        return None
    choices = typing.get_args(value.model_fields["arch"].annotation)
    return str(choices[0]) if len(choices) == 1 else None


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
    """What the user's code raised, with the line of it that did."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if len(frames) > 1 else place
    fix = None
    if isinstance(error, ModuleNotFoundError):
        fix = "A plugin of several files is a package: name its directory, and import with `from .other import ...`."
    return UserError(f"The plugin cannot be loaded: {type(error).__name__}: {error}", where, fix)


def _hash(module: ModuleType, place: str) -> str:
    """SHA-256 of a file, or of all Python files of a package with their places in it."""
    if module.__file__ is None or not module.__file__.endswith(".py"):
        raise UserError("A plugin is Python source, and this module has none", place)
    file = Path(module.__file__)
    if file.name != "__init__.py":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    whole = hashlib.sha256()
    for part in sorted(file.parent.rglob("*.py")):
        whole.update(f"{part.relative_to(file.parent)}\0{hashlib.sha256(part.read_bytes()).hexdigest()}\n".encode())
    return whole.hexdigest()
