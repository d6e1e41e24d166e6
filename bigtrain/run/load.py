"""From a run's YAML to its typed config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bigtrain.config import UserError, load, yaml_file
from bigtrain.config.plugin import active_plugin
from bigtrain.models.config import FAMILIES, preset
from bigtrain.run.config import RunConfig
from bigtrain.run.directory import RunDirectory


def load_config(path: Path, overrides: list[str] | None = None, name: str | None = None) -> RunConfig:
    """Read, complete and check a run's YAML; paths in it become absolute.

    The config in a run directory gets the directory's name, whatever name it holds.

    What a plugin registers is known once it is loaded (`bigtrain.config.plugin.load_plugin`).

    Raises:
        UserError: Anything wrong in the file, with its line; a run that uses a plugin which is not loaded.
    """
    document = load.read_document(path, overrides or [])
    if name is None and _is_of_a_run(path) and not any(one.startswith("name=") for one in overrides or []):
        # A copied or renamed directory is a run of its own: its config still has the name of the original.
        name = Path(os.path.abspath(path)).parent.name
    if name is not None:
        document.override(("name",), name)
    _require_plugin(document, path)
    return config_of(document)


def config_of(document: yaml_file.YamlDocument) -> RunConfig:
    """The config that a parsed document holds; see `load_config`. The document's preset is written out in place."""
    _complete_model(document)
    return _absolute(load.build(RunConfig, document))


def _is_of_a_run(path: Path) -> bool:
    """Whether this is the config that a run recorded in its directory."""
    directory = RunDirectory(path.parent)
    return path.name == directory.config.name and directory.exists()


def _require_plugin(document: yaml_file.YamlDocument, path: Path) -> None:
    """Refuse the config of a run that uses a plugin, if it is not loaded."""
    if not _is_of_a_run(path):
        return
    directory = RunDirectory(path.parent)
    source = directory.read_record().get("plugin")
    model = document.value.get("model")
    if source is None or not isinstance(model, dict):
        return
    loaded = active_plugin()
    places = {one.place for one in loaded.sources} if loaded is not None else set()
    if not places.issuperset(source["place"].split(os.pathsep)) and not _all_known(document):
        raise UserError(
            f"This run (model.arch '{model.get('arch')}') uses the user's own code, which is loaded only where it is "
            "named",
            str(path),
            f"Add --plugin {source['place']}",
        )


def _all_known(document: yaml_file.YamlDocument) -> bool:
    """Whether a config can be read with what is registered now."""
    try:
        load.build(RunConfig, document)
    except UserError:
        return False
    return True


def _complete_model(document: yaml_file.YamlDocument) -> None:
    """Lay the preset under the model's own keys, in place."""
    model = document.value.get("model")
    if not isinstance(model, dict):
        raise UserError(
            "The key 'model' is missing" if model is None else "'model' must be a mapping of keys",
            document.where(("model",)),
            f"Give model: {{arch: NAME, ...}} with one of {', '.join(FAMILIES)}, or model: {{preset: NAME}}.",
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
        raise UserError("The key 'model.arch' is missing", where, f"Known: {', '.join(FAMILIES)}.")


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
