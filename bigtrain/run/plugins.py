"""The plugins that a run uses: their hashes in the run's identity, and their entry in run.json."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.config.section import PluginSource
    from bigtrain.run.config import RunConfig


def plugin_hashes(config: RunConfig, keys: tuple[str, ...]) -> dict[str, str]:
    """Hash of the plugins' source for each of `keys` whose section plugins define; see `plugins_of`."""
    sources = {key: plugins_of(config, key) for key in keys}
    return {key: _hash(found) for key, found in sources.items() if found}


def plugins_of(config: RunConfig, key: str) -> list[PluginSource]:
    """The plugins that define the section of a recipe's key; also augmentations in `data`, and clips in `optimizer`."""
    section = getattr(config, key)
    if key in ("data", "optimizer"):
        return list(dict.fromkeys(_sources(section)))
    # The code of nested classes in other sections has never been a part of the identity.
    source = getattr(section, "plugin", None)
    return [] if source is None else [source]


def used_plugins(config: RunConfig) -> dict[str, Any]:
    """The entry `plugin` of run.json: places and hash of the plugins whose classes the config uses; {} if none."""
    sources = list(dict.fromkeys(_sources(config)))
    if not sources:
        return {}
    return {"plugin": {"place": places(sources), "sha256": _hash(sources)}}


def places(sources: list[PluginSource]) -> str:
    """The places of several plugins, joined in the format of `--plugin`."""
    return os.pathsep.join(source.place for source in sources)


def _hash(sources: list[PluginSource]) -> str:
    hashes = [source.sha256 for source in sources]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _sources(value: Any) -> Iterator[PluginSource]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _sources(part)
        return
    fields = getattr(type(value), "model_fields", None)
    if fields is None:
        return
    if getattr(value, "plugin", None) is not None:
        yield value.plugin
    for name in fields:
        yield from _sources(getattr(value, name))
