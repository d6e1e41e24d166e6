"""Reads a sweep's YAML into its sections and its base run; each error names its line."""

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
"""Default number of held-out sequences for the evaluation of a trial; all trials use the same sequences."""
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
    """A sweep's config, and its base run as written in the file."""

    config: SweepConfig
    document: yaml_file.YamlDocument
    """The base run, with line numbers of the sweep's file."""

    @property
    def where(self) -> str:
        """Path of the sweep's file."""
        return self.document.source

    def trial(self, sections: dict[str, Any]) -> RunConfig:
        """The config of one trial: the base run, with keys of its sections overridden.

        Args:
            sections: Keys and sections of the trial. A section replaces single keys of the base run's section.

        Raises:
            UserError: The base run is wrong, or does not fit these sections; the error names the line.
        """
        document = yaml_file.YamlDocument(copy.deepcopy(self.document.value), self.document.source, self.document.lines)
        for name, value in sections.items():
            below = document.value.get(name)
            document.value[name] = {**below, **value} if isinstance(below, dict) and isinstance(value, dict) else value
        return config_of(document)

    @property
    def ranks(self) -> int:
        """World size of a trial: its ranks over all nodes."""
        slots = self.config.slots
        return slots.procs * (self.job().nodes if slots.on == "ray" else 1)

    def job(self) -> JobConfig:
        """The `job` section of all trials.

        Raises:
            UserError: The section is wrong; the error names the line.
        """
        lines = {key[1:]: line for key, line in self.document.lines.items() if key[:1] == ("job",)}
        document = yaml_file.YamlDocument(dict(self.document.value.get("job") or {}), self.document.source, lines)
        return load.build(JobConfig, document)


def load_sweep(path: Path, overrides: list[str] | None = None, name: str | None = None) -> Sweep:
    """Read a sweep's YAML.

    Args:
        path: The file.
        overrides: key=value pairs that override keys of the file.
        name: Name of the sweep, in place of the name in the file.

    Raises:
        UserError: The file is wrong, sets a key that the sweep itself sets, or has no held-out data.
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
    """The JSON Schema of a sweep's YAML, for editors.

    Args:
        run: The JSON Schema of a run (`bigtrain.run.config_schema`); the base run has its sections.
    """
    schema = {**load.json_schema(SweepConfig), "title": "bigtrain sweep"}
    schema["$defs"] = {**run["$defs"], **schema["$defs"]}
    sections = {key: value for key, value in run["properties"].items() if (key,) not in _SET and key != "model"}
    # The ladder sets the keys of `model` that a run requires, so the schema does not describe that section.
    schema["properties"]["base"] |= {
        "properties": {**sections, "model": {"type": "object"}}, "required": ["model", "data"],
        "additionalProperties": False,
    }  # fmt: skip
    return schema
