"""From a run's YAML to its typed config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.config import UserError, load, yaml_file
from bigtrain.models.config import ModelConfig, families, family, preset
from bigtrain.plugin import Plugin
from bigtrain.run.config import RunConfig, run_config
from bigtrain.run.directory import RunDirectory


def load_config(
    path: Path, overrides: list[str] | None = None, name: str | None = None, plugin: Plugin | None = None
) -> RunConfig:
    """Read, complete and check a run's YAML; paths in it become absolute.

    Args:
        plugin: The user's own model families.

    Raises:
        UserError: Anything wrong in the file, with its line; a model that comes with a plugin which is not given.
    """
    document = load.read_document(path, overrides or [])
    if name is not None:
        document.override(("name",), name)
    own = plugin.families if plugin else {}
    _require_plugin(document, path, own)
    return config_of(document, plugin)


def config_of(document: yaml_file.Document, plugin: Plugin | None = None) -> RunConfig:
    """The config that a parsed document holds; see `load_config`. The document's preset is written out in place."""
    kind = _complete_model(document, plugin.families if plugin else {})
    return _absolute(load.build(kind, document))


def _require_plugin(document: yaml_file.Document, path: Path, own: Mapping[str, type[ModelConfig]]) -> None:
    """Refuse the config of a run whose model came with a plugin, where it is not given again."""
    model = document.value.get("model")
    directory = RunDirectory(path.parent)
    if path.name != directory.config.name or not directory.exists() or not isinstance(model, dict):
        return
    arch, source = model.get("arch"), directory.read_record().get("plugin")
    if source is not None and arch not in own:
        raise UserError(
            f"The model of this run, arch '{arch}', is the user's own code, which is loaded only where it is named",
            str(path),
            f"Add --plugin {source['place']}",
        )


def _complete_model(document: yaml_file.Document, own: Mapping[str, type[ModelConfig]]) -> type[RunConfig]:
    """Lay the preset under the model's own keys; the typed config of its family."""
    model = document.value.get("model")
    if not isinstance(model, dict):
        raise UserError(
            "The key 'model' is missing" if model is None else "'model' must be a mapping of keys",
            document.where(("model",)),
            f"Give model: {{arch: NAME, ...}} with one of {', '.join(families())}, or model: {{preset: NAME}}.",
        )
    where = document.where(("model", "preset" if "preset" in model else "arch"))
    name = model.pop("preset", None)
    if name is not None:
        try:
            merged = {**preset(str(name)), **model}
        except UserError as error:
            raise UserError(error.what, where, error.fix) from None
        model.clear()
        model.update(merged)
    if "arch" not in model:
        raise UserError("The key 'model.arch' is missing", where, f"Known: {', '.join([*families(), *own])}.")
    try:
        return run_config(own.get(str(model["arch"])) or family(str(model["arch"])))
    except UserError as error:
        raise UserError(error.what, where, error.fix) from None


def _absolute(config: RunConfig) -> RunConfig:
    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else os.path.abspath(path)

    def absolute_places(value: Any) -> Any:
        if not isinstance(value, tuple):
            return absolute(value)
        # The name is written out: by its path alone it could become another one.
        return tuple(one.model_copy(update={"path": absolute(one.path), "name": one.source}) for one in value)

    data = config.data.model_copy(
        update={"train": absolute_places(config.data.train), "validation": absolute_places(config.data.validation)}
    )
    streaming = config.streaming.model_copy(update={"cache_dir": absolute(config.streaming.cache_dir)})
    return config.model_copy(update={"data": data, "streaming": streaming})
