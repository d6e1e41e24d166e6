"""The config system: sections, units, loading with line numbers, overrides, JSON Schema.

It does not depend on any particular section: `bigtrain.run` combines the sections to a config, and each extension point
has a registry of its implementations.
"""

from bigtrain.config.errors import CorruptionError, UserError, nearest
from bigtrain.config.registry import REGISTRIES, Registry
from bigtrain.config.section import PluginSource, Section
from bigtrain.config.units import NUMBER_OR_TEXT, BatchSize, Bytes, Count, Duration

__all__ = [
    "NUMBER_OR_TEXT",
    "REGISTRIES",
    "BatchSize",
    "Bytes",
    "CorruptionError",
    "Count",
    "Duration",
    "PluginSource",
    "Registry",
    "Section",
    "UserError",
    "nearest",
]
