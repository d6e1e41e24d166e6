"""A run's config from a file, a mapping or another config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.run import RunConfig

Overrides = Mapping[str, Any] | Iterable[str] | None
"""{"optimizer.lr": 3e-4}, or ["optimizer.lr=3e-4"] as on the command line."""


def read_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Overrides = None,
    *,
    name: str | None = None,
    plugin: str | os.PathLike[str] | Iterable[str] | None = None,
) -> RunConfig:
    """The complete, checked config of a run.

    Args:
        config: The path of a YAML file, the same keys as a mapping, or a config.
        overrides: Values for keys of it: {"optimizer.lr": 3e-4}.
        name: Name of the run, instead of the config's.
        plugin: Your own code, as `--plugin` takes it.

    Raises:
        UserError: Anything wrong in it, with the key (and the line of a file).
    """
    from bigtrain.config import load, yaml_file
    from bigtrain.run import RunConfig, config_of, load_config

    load_plugins(plugin)
    words = list(_words(overrides))
    if isinstance(config, (str, os.PathLike)):
        return load_config(Path(config), words, name)
    value = config.plain() if isinstance(config, RunConfig) else json.loads(json.dumps(config))
    if name is not None:
        words.append(f"name={json.dumps(name)}")
    return config_of(load.override(yaml_file.YamlDocument(value, "config"), words))


def load_plugins(plugin: str | os.PathLike[str] | Iterable[str] | None) -> None:
    """Load your own code, as `--plugin` does."""
    if plugin is None:
        return
    from bigtrain.config.plugin import load_plugin

    places = [os.fspath(plugin)] if isinstance(plugin, (str, os.PathLike)) else plugin
    load_plugin(os.pathsep.join(places))


def _words(overrides: Overrides) -> Iterable[str]:
    if isinstance(overrides, Mapping):
        # JSON is YAML; a text needs its quotes.
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return overrides or []
