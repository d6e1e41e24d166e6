"""From a sweep's YAML to its sections and to the base run, each error with its line."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config import UserError, load, yaml_file
from bigtrain.jobs.config import JobConfig
from bigtrain.run import RunConfig, config_of
from bigtrain.sweeps.config import SweepConfig

SHAPE = ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width")
"""Keys of `model` that a rung of the ladder sets."""
HELD_OUT_SEQUENCES = 4096
"""Sequences that each trial is evaluated on, unless the base run says how many: all trials on the same ones."""
_SET: dict[tuple[str, ...], str] = {
    ("name",): "the sweep names its trials",
    ("seed",): "give the sweep's `seeds`",
    ("duration",): "give `tokens_per_param`",
    ("batch",): "replace the rule `ladder.batch`",
    ("schedule",): "replace the rules `ladder.warmup` and `ladder.decay`",
    ("init",): "trunks and branches set it",
    ("optimizer", "lr"): "replace the rule `ladder.lr`",
    ("optimizer", "betas"): "replace the rule `ladder.beta2`",
    ("tracking", "group"): "the sweep's name is the group",
    ("evaluation", "batches"): "batches differ from size to size; give `evaluation.sequences`, the same for all",
    ("model", "preset"): "give `model.arch`: the ladder sets the shape",
    **{("model", key): "the ladder sets the shape; give a size its own under `sizes[].model`" for key in SHAPE},
}


@dataclass(frozen=True)
class Sweep:
    """A sweep's config, and its base run as it stands in the file."""

    config: SweepConfig
    document: yaml_file.YamlDocument
    """Of the base run, with the lines of the sweep's file."""

    @property
    def where(self) -> str:
        """The file."""
        return self.document.source

    def trial(self, sections: dict[str, Any]) -> RunConfig:
        """The config of one trial: the base run with keys of sections laid over it, one level deep.

        Raises:
            UserError: The base run is wrong, with its line; or the whole does not go together.
        """
        document = yaml_file.YamlDocument(copy.deepcopy(self.document.value), self.document.source, self.document.lines)
        for name, value in sections.items():
            below = document.value.get(name)
            document.value[name] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
        return config_of(document)

    @property
    def ranks(self) -> int:
        """Processes of a trial, over all its nodes."""
        slots = self.config.slots
        return slots.procs * (self.job().nodes if slots.on == "ray" else 1)

    def job(self) -> JobConfig:
        """The `job` section of all trials.

        Raises:
            UserError: It is wrong, with its line.
        """
        lines = {key[1:]: line for key, line in self.document.lines.items() if key[:1] == ("job",)}
        document = yaml_file.YamlDocument(dict(self.document.value.get("job") or {}), self.document.source, lines)
        return load.build(JobConfig, document)


def load_sweep(path: Path, overrides: list[str] | None = None, name: str | None = None) -> Sweep:
    """Read a sweep's YAML.

    Raises:
        UserError: Anything wrong in the file, with its line.
    """
    document = load.read_document(path, overrides or [])
    if name is not None:
        document.override(("name",), name)
    config = load.build(SweepConfig, document)
    lines = {key[1:]: line for key, line in document.lines.items() if key[:1] == ("base",)}
    base = yaml_file.YamlDocument(dict(config.base), document.source, lines)
    for key, instead in _SET.items():
        value: Any = base.value
        for part in key:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            raise UserError(f"'base.{'.'.join(key)}' is set by the sweep", base.where(key), f"Remove it: {instead}.")
    for name in config.ladder.keys:
        if tuple(name.split(".")) in _SET or (name.partition(".")[0],) in _SET:
            fix = f"Remove it: {_SET.get(tuple(name.split('.'))) or _SET[(name.partition('.')[0],)]}."
            raise UserError(f"'{name}' is set by the sweep", document.where(("ladder", "keys")), fix)
    if not isinstance(base.value.get("data"), dict) or not base.value["data"].get("validation"):
        raise UserError(
            "A sweep compares held-out losses, and 'base.data.validation' is missing", base.where(("data",)),
            "Name held-out shards; `bigtrain data pack --validation 1%` makes some.",
        )  # fmt: skip
    evaluation = base.value.get("evaluation")
    if evaluation is None or isinstance(evaluation, dict):
        base.value["evaluation"] = {"sequences": HELD_OUT_SEQUENCES, **(evaluation or {})}
    return Sweep(config, base)


def sweep_schema(run: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a sweep's YAML, for editors.

    Args:
        run: That of a run (`bigtrain.run.config_schema`), whose sections the base run has.
    """
    schema = {**load.json_schema(SweepConfig), "title": "bigtrain sweep"}
    schema["$defs"] = {**run["$defs"], **schema["$defs"]}
    sections = {key: value for key, value in run["properties"].items() if (key,) not in _SET and key != "model"}
    # The ladder sets the keys of `model` that a run requires, so that section is not described.
    schema["properties"]["base"] |= {
        "properties": {**sections, "model": {"type": "object"}}, "required": ["model", "data"],
        "additionalProperties": False,
    }  # fmt: skip
    return schema
