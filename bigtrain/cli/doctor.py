"""The command `bigtrain doctor`, which finds causes of failures before a run starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import RUNS, Json, RunsDir, errors, show
from bigtrain.cli.remote import Address, TokenFile, open_dashboard, reached

app = typer.Typer()


@app.command()
def doctor(
    address: Address = None,
    token_file: TokenFile = None,
    secrets_file: Annotated[Path | None, typer.Option(help="File of secret keys for the ranks, on the nodes.")] = None,
    runs_dir: RunsDir = RUNS,
    as_json: Json = False,
) -> None:
    """Check versions, clocks, disks, shared storage, network and keys; exits with 1 if a check fails."""
    with errors(as_json):
        place = str(runs_dir.absolute())
        secrets = None if secrets_file is None else str(secrets_file)
        if address is None:
            from bigtrain.jobs.cluster.doctor import local_checks, result

            found = result(local_checks(runs_dir, secrets))
        else:
            from bigtrain.jobs.cluster.submission import examine

            dashboard = open_dashboard(address, token_file)
            with reached(dashboard):
                found = examine(dashboard, place, secrets, lambda line: print(line, file=sys.stderr, flush=True))
        show(found, as_json, _text)
    raise typer.Exit(1 if found["failed"] else 0)


def _text(result: dict[str, Any]) -> str:
    width = max((len(f"{check['name']} {check['where']}") for check in result["checks"]), default=0)
    lines = []
    for check in result["checks"]:
        fix = f"; {check['fix']}" if check["fix"] else ""
        lines.append(f"{check['state']:6}  {check['name'] + ' ' + check['where']:{width}}  {check['value']}{fix}")
    return "\n".join([*lines, f"{result['failed']} of {len(result['checks'])} checks failed"])
