"""A run: its config, its identity and its directory.

| file | contents |
|---|---|
| names.py | file names in a run directory |
| exits.py | exit codes |
| events.py | lines of events.jsonl, and the id of the machine's boot |
| lease.py | the lease, which gives one process the right to write to a run directory |
| directory.py | run directories, and the search for one |
| plugins.py | the plugins that a run uses |
| recipe.py | the recipe and its hash, which is the run's identity |
| config.py | the typed config |
| load.py | from YAML to the config |
| schema.py | JSON Schema of the YAML |

A name's module is imported when the name is first used. The modules of the config take half a second to import, others
almost no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bigtrain.run.config import BatchConfig, RunConfig
    from bigtrain.run.directory import (
        FORMAT_VERSION,
        RunDirectory,
        find_checkpoints,
        find_run,
        list_runs,
        split_run_step,
    )
    from bigtrain.run.events import append_event, boot_hash
    from bigtrain.run.exits import ExitCode
    from bigtrain.run.lease import (
        LEASE_LIFE_S,
        LEASE_RENEWAL_S,
        Lease,
        Leased,
        LeaseHolder,
        in_use,
        lease_check,
    )
    from bigtrain.run.load import config_of, load_config
    from bigtrain.run.names import NAME_PATTERN
    from bigtrain.run.recipe import RECIPE, differences, identity, recipe_of, with_defaults
    from bigtrain.run.schema import config_schema

__all__ = [
    "FORMAT_VERSION",
    "LEASE_LIFE_S",
    "LEASE_RENEWAL_S",
    "NAME_PATTERN",
    "RECIPE",
    "BatchConfig",
    "ExitCode",
    "Lease",
    "LeaseHolder",
    "Leased",
    "RunConfig",
    "RunDirectory",
    "append_event",
    "boot_hash",
    "config_of",
    "config_schema",
    "differences",
    "find_checkpoints",
    "find_run",
    "identity",
    "in_use",
    "lease_check",
    "list_runs",
    "load_config",
    "recipe_of",
    "split_run_step",
    "with_defaults",
]

_FILES: Final = {
    "config": ("BatchConfig", "RunConfig"),
    "directory": ("FORMAT_VERSION", "RunDirectory", "find_checkpoints", "find_run", "list_runs", "split_run_step"),
    "events": ("append_event", "boot_hash"),
    "exits": ("ExitCode",),
    "lease": ("LEASE_LIFE_S", "LEASE_RENEWAL_S", "Lease", "LeaseHolder", "Leased", "in_use", "lease_check"),
    "load": ("config_of", "load_config"),
    "names": ("NAME_PATTERN",),
    "recipe": ("RECIPE", "differences", "identity", "recipe_of", "with_defaults"),
    "schema": ("config_schema",),
}
_HOMES: Final = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
