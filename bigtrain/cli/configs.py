"""The commands `bigtrain config`: show, validate and describe configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bigtrain.cli.common import Json, Overrides, PluginOption, errors, load, load_plugins, show

app = typer.Typer(help="Show, validate and describe configs.", no_args_is_help=True)


@app.command("show")
def config_show(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Print the resolved config, with all defaults and absolute paths."""
    with errors(as_json):
        from bigtrain.config.yaml_file import dump

        show(load(config, overrides, plugin=plugin).plain(), as_json, lambda value: dump(value).rstrip())


@app.command("validate")
def config_validate(
    config: Annotated[Path, typer.Argument(help="A run's YAML.")],
    overrides: Overrides = None,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Check a config against its data, without training."""
    with errors(as_json):
        from bigtrain.models.check import check_model
        from bigtrain.training.prepare import prepare

        prepared = prepare(load(config, overrides, plugin=plugin))
        check_model(prepared.config.model, prepared.outputs, prepared.config.engine.deterministic == "across_layouts")
        result = {
            "name": prepared.config.name,
            "identity": prepared.identity,
            "total_steps": prepared.total_steps,
            "parameters": prepared.config.model.parameter_count(prepared.outputs),
        }
        show(
            result,
            as_json,
            lambda value: (
                f"{config} is valid: {value['parameters'] / 1e6:.2f}M parameters, {value['total_steps']} steps"
            ),
        )


@app.command("schema")
def config_schema(
    plugin: PluginOption = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Print the schema of a sweep's YAML instead of a run's.")
    ] = False,
) -> None:
    """Print the JSON Schema of a run's YAML, for editors."""
    with errors():
        from bigtrain.run import config_schema as schema
        from bigtrain.sweeps.load import sweep_schema

        load_plugins(plugin)
        run = schema()
        print(json.dumps(sweep_schema(run) if sweep else run, indent=2))
