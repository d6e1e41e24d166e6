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
    """The keys of the recipe whose section a plugin defines, and the hash of its source."""
    sources = {key: getattr(getattr(config, key), "plugin", None) for key in keys}
    return {key: source.sha256 for key, source in sources.items() if source is not None}


def used_plugins(config: RunConfig) -> dict[str, Any]:
    """The entry `plugin` of a run's record: where the plugins lie whose sections the config holds; empty without."""
    sources = dict.fromkeys(_sources(config))
    if not sources:
        return {}
    hashes = [source.sha256 for source in sources]
    total = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return {"plugin": {"place": os.pathsep.join(source.place for source in sources), "sha256": total}}


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
