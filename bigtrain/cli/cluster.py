"""Commands that start and end a Ray cluster on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import Json, errors, show

app = typer.Typer(help="Start and stop a Ray cluster on this machine, for trials.", no_args_is_help=True)

Directory = Annotated[Path | None, typer.Option("--dir", help="Directory of the cluster's record.")]


@app.command()
def local(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Number of Ray nodes.")] = 3,
    procs_per_node: Annotated[int, typer.Option(min=1, help="Number of ranks on each node.")] = 2,
    isolated: Annotated[bool, typer.Option("--isolated", help="Give each node its own namespaces (Linux).")] = False,
    shared: Annotated[
        list[Path] | None, typer.Option(help="Directory under /tmp that isolated nodes share; may be repeated.")
    ] = None,
    directory: Directory = None,
    as_json: Json = False,
) -> None:
    """Start several Ray nodes on this machine, and wait until they are up."""
    with errors(as_json):
        from bigtrain.jobs.cluster.local import default_directory, raise_local

        record = raise_local(
            (directory or default_directory()).absolute(),
            nodes=nodes,
            procs_per_node=procs_per_node,
            isolated=isolated,
            shared=shared,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        result = {
            "address": record.address,
            "token_file": record.token_file,
            "nodes": [{"name": node.name, "ip": node.ip, "pid": node.pid} for node in record.nodes],
        }
        show(result, as_json, _how_to_use)


def _how_to_use(result: dict[str, Any]) -> str:
    return (
        f"{len(result['nodes'])} nodes are up; to use them:\n"
        f"export BIGTRAIN_ADDRESS={result['address']} RAY_AUTH_TOKEN_PATH={result['token_file']}"
    )


@app.command()
def down(directory: Directory = None, as_json: Json = False) -> None:
    """End all processes of the cluster that `cluster local` has started, and no others."""
    with errors(as_json):
        from bigtrain.jobs.cluster.local import default_directory, take_down

        count = take_down((directory or default_directory()).absolute())
        show({"nodes": count}, as_json, lambda _: f"{count} nodes are down")
