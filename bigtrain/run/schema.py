"""JSON Schema of a run's YAML, for editors."""

from __future__ import annotations

from typing import Any

from bigtrain.config import load
from bigtrain.models.config import FAMILIES, preset, presets
from bigtrain.run.config import RunConfig


def config_schema() -> dict[str, Any]:
    """JSON Schema of a run's YAML; `model` is the section of a model family, or a preset with overriding keys."""
    schema = {**load.json_schema(RunConfig), "title": "bigtrain run"}
    choices = []
    for arch in FAMILIES:
        model = load.json_schema(FAMILIES[arch])
        schema["$defs"].update(model.pop("$defs", {}))
        del model["$schema"]
        model["properties"]["arch"] = {"const": arch, "type": "string"}
        model["anyOf"] = [{"required": sorted({"arch", *model.pop("required", [])})}]
        shapes = [name for name in presets() if preset(name)["arch"] == arch]
        if shapes:
            model["properties"]["preset"] = {"enum": shapes, "description": "A published shape; keys override it."}
            model["anyOf"].append({"required": ["preset"]})
        schema["$defs"][f"model.{arch}"] = model
        choices.append({"$ref": f"#/$defs/model.{arch}"})
    schema["properties"]["model"] = {"anyOf": choices, "description": RunConfig.model_fields["model"].description}
    return schema
