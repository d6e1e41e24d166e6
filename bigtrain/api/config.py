"""Reading a run's config from a file, a mapping or another config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.run import RunConfig

Overrides = Mapping[str, Any] | Iterable[str] | None
"""Values that replace keys of a config: {"optimizer.lr": 3e-4}, or ["optimizer.lr=3e-4"] as on the command line."""


def read_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Overrides = None,
    *,
    name: str | None = None,
    plugin: str | os.PathLike[str] | Iterable[str] | None = None,
) -> RunConfig:
    """Read and check the config of a run, including all defaults.

    Args:
        config: The path of a YAML file, the same keys as a mapping, or a `RunConfig`.
        overrides: Values that replace keys of the config: {"optimizer.lr": 3e-4}.
        name: Name of the run, instead of the config's.
        plugin: Your own code, one or several values of `--plugin`.

    Raises:
        UserError: The config has an error; the message names the key, and for a file the line.
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
    """Load your own code, as the option `--plugin` does; None: nothing."""
    if plugin is None:
        return
    from bigtrain.config.plugin import load_plugin

    places = [os.fspath(plugin)] if isinstance(plugin, (str, os.PathLike)) else plugin
    load_plugin(os.pathsep.join(places))


def _words(overrides: Overrides) -> Iterable[str]:
    if isinstance(overrides, Mapping):
        # JSON is valid YAML, and it quotes texts.
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return overrides or []
