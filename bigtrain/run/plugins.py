"""Which plugins a run uses: their part in its identity, and their entry in its record."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.config.section import PluginSource
    from bigtrain.run.config import RunConfig


def plugin_hashes(config: RunConfig, keys: tuple[str, ...]) -> dict[str, str]:
    """The keys of the recipe whose section a plugin defines, or whose augmentations, and the hash of its source."""
    sources = {key: plugins_of(config, key) for key in keys}
    return {key: _hash(found) for key, found in sources.items() if found}


def plugins_of(config: RunConfig, key: str) -> list[PluginSource]:
    """The plugins that define a section of the recipe, or the augmentations in it."""
    section = getattr(config, key)
    if key == "data":
        return list(dict.fromkeys(_sources(section)))
    # What lies deeper in other sections has never been part of the identity by its code.
    source = getattr(section, "plugin", None)
    return [] if source is None else [source]


def used_plugins(config: RunConfig) -> dict[str, Any]:
    """The entry `plugin` of a run's record: where the plugins lie whose sections the config holds; empty without."""
    sources = list(dict.fromkeys(_sources(config)))
    if not sources:
        return {}
    return {"plugin": {"place": places(sources), "sha256": _hash(sources)}}


def places(sources: list[PluginSource]) -> str:
    """Where plugins lie, as `--plugin` takes several."""
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
