"""The recipe, the part of a config that says what is trained, and its hash, the run's identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from bigtrain.config.section import Section
from bigtrain.run.plugins import plugin_hashes

if TYPE_CHECKING:
    from bigtrain.run.config import RunConfig

RECIPE: Final = ("seed", "model", "data", "batch", "duration", "optimizer", "schedule", "precision", "init")
"""The keys that determine a run's identity; all other keys are the execution and may change at a resume."""


def recipe_of(config: RunConfig, data: Mapping[str, Any], batch_sequences: int) -> dict[str, Any]:
    """The recipe of a config, in which hashes of their contents identify the data and `init.source`.

    The duration is included only if it affects the learning rates of earlier steps; otherwise a run may be prolonged.

    Args:
        config: The config.
        data: Keys that replace those of the section `data`, with fingerprints instead of paths.
        batch_sequences: Sequences in a global batch.
    """
    plain = config.plain()
    recipe = {key: plain[key] for key in RECIPE}
    fields = type(config.model).model_fields
    unchanged = {key for key in config.model.later_keys if getattr(config.model, key) == fields[key].default}
    recipe["model"] = {key: value for key, value in recipe["model"].items() if key not in unchanged}
    recipe["model"] |= config.model.fingerprint()
    for key, sha256 in plugin_hashes(config, RECIPE).items():
        recipe[key]["plugin"] = sha256
    recipe["data"] = {**recipe["data"], **data}
    for key in ("consumed", "augment"):
        if not recipe["data"][key]:
            del recipe["data"][key]
    recipe["batch"] = {"sequences": batch_sequences}
    recipe["init"] = {"source": config.init.hash, "state": config.init.state, "fresh": list(config.init.fresh)}
    if config.init.new_rows is not None:
        recipe["init"]["new_rows"] = config.init.new_rows
    if not config.optimizer.parts:
        del recipe["optimizer"]["parts"]
    if not config.optimizer.ends_at_duration(config.schedule):
        del recipe["duration"]
    return recipe


def with_defaults(recorded: dict[str, Any], recipe: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Complete a recipe that an earlier version recorded with the defaults of keys that this version did not have.

    Args:
        recorded: The recorded recipe.
        recipe: The recipe of `config` in this version; only its keys are added.
        config: The config with which the run is started again.
    """
    completed: dict[str, Any] = _with_defaults(recorded, recipe, config)
    return completed


def _with_defaults(recorded: Any, recipe: Any, section: Any) -> Any:
    if isinstance(section, (list, tuple)) and isinstance(recorded, list) and len(recorded) == len(section):
        return [_with_defaults(*parts) for parts in zip(recorded, recipe, section, strict=True)]
    if not isinstance(section, Section) or not isinstance(recorded, dict) or not isinstance(recipe, dict):
        return recorded
    fields = type(section).model_fields
    absent = [name for name in recipe if name not in recorded and name in fields and not fields[name].is_required()]
    defaults = {name: fields[name].get_default(call_default_factory=True, validated_data={}) for name in absent}
    plain = section.model_copy(update=defaults).plain()
    known = {name: recorded[name] for name in recorded}
    for name in recorded.keys() & recipe.keys() & fields.keys():
        known[name] = _with_defaults(recorded[name], recipe[name], getattr(section, name))
    return known | {name: plain[name] for name in absent}


def identity(recipe: dict[str, Any]) -> str:
    """The SHA-256 hash of a recipe, in hexadecimal; two runs with the same identity compute the same losses."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield one line for each key that differs: "optimizer.lr: 0.001 -> 0.002"."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before if key in old else '(absent)'} -> {after if key in new else '(absent)'}"
