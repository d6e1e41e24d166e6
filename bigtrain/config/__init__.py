"""The machinery of configuration: sections, units, loading with line numbers, overrides, JSON Schema.

It knows no section by name: `bigtrain.run` composes them, and extension points fill their registries.
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
