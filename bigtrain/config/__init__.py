"""The machinery of configuration: sections, units, loading with line numbers, overrides, JSON Schema.

It knows no section by name: `bigtrain.run` composes them.
"""

from bigtrain.config.errors import CorruptionError, UserError, nearest
from bigtrain.config.section import Section
from bigtrain.config.units import NUMBER_OR_TEXT, BatchSize, Bytes, Count, Duration

__all__ = [
    "NUMBER_OR_TEXT",
    "BatchSize",
    "Bytes",
    "CorruptionError",
    "Count",
    "Duration",
    "Section",
    "UserError",
    "nearest",
]
