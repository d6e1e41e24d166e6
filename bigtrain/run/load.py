"""Loading of a run's typed config from its YAML."""

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
    """Read a run's YAML, fill in the preset, and check the config. Paths become absolute.

    The config.yaml of a run directory gets the name of its directory. Plugins must have been loaded before
    (`bigtrain.config.plugin.load_plugin`).

    Args:
        path: The YAML file.
        overrides: KEY=VALUE texts, as on the command line.
        name: Name of the run, which replaces that of the file; None: keep it.

    Raises:
        UserError: The file has an error, which the message locates by its line; or the run uses a plugin that is not
            loaded.
    """
    document = load.read_document(path, overrides or [])
    if name is None and _is_of_a_run(path) and not any(one.startswith("name=") for one in overrides or []):
        # In a copied or renamed directory, which is a run of its own, the config has the name of the original.
        name = Path(os.path.abspath(path)).parent.name
    if name is not None:
        document.override(("name",), name)
    _require_plugin(document, path)
    return config_of(document)


def config_of(document: yaml_file.YamlDocument) -> RunConfig:
    """The config of a parsed document; see `load_config`. The model's preset is filled in, in the document itself."""
    _complete_model(document)
    return _absolute(load.build(RunConfig, document))


def _is_of_a_run(path: Path) -> bool:
    """Whether the file is the resolved config in a run directory."""
    directory = RunDirectory(path.parent)
    return path.name == directory.config.name and directory.exists()


def _require_plugin(document: yaml_file.YamlDocument, path: Path) -> None:
    """Raise UserError if the config belongs to a run that uses a plugin which is not loaded."""
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
            f"This run (model.arch '{model.get('arch')}') uses the user's own code, which is loaded only if --plugin "
            "names it",
            str(path),
            f"Add --plugin {source['place']}",
        )


def _all_known(document: yaml_file.YamlDocument) -> bool:
    """Whether the registered classes are enough to build the config."""
    try:
        load.build(RunConfig, document)
    except UserError:
        return False
    return True


def _complete_model(document: yaml_file.YamlDocument) -> None:
    """Replace `model.preset` by the keys of the preset, in place; the model's own keys override them."""
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
        # The name is written explicitly: derived from the absolute path, it could differ.
        return tuple(one.model_copy(update={"path": absolute(one.path), "name": one.source}) for one in value)

    data = config.data.model_copy(
        update={"train": absolute_places(config.data.train), "validation": absolute_places(config.data.validation)}
    )
    streaming = config.streaming.model_copy(update={"cache_dir": absolute(config.streaming.cache_dir)})
    return config.model_copy(update={"data": data, "streaming": streaming})
