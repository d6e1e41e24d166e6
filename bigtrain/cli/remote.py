"""Options and functions of the commands that reach a cluster and show its runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bigtrain import variables
from bigtrain.streams import enduring

if TYPE_CHECKING:
    from bigtrain.jobs.cluster.dashboard import Dashboard
    from bigtrain.jobs.cluster.views import RunView

Address = Annotated[
    str | None,
    typer.Option(envvar=variables.ADDRESS, help="A Ray cluster's dashboard: http://HOST:8265. Without it: here."),
]
TokenFile = Annotated[
    Path | None, typer.Option(help="The cluster's token, mode 0600; else as Ray finds it: RAY_AUTH_TOKEN_PATH.")
]
DETACHED = 130


@contextmanager
def reached(dashboard: Dashboard) -> Iterator[None]:
    """Turn a lost dashboard into a user error, which is printed as one line.

    Raises:
        UserError: The dashboard does not answer.
    """
    from bigtrain.jobs.cluster.dashboard import DashboardGone

    try:
        yield
    except DashboardGone as error:
        raise dashboard.unreachable(error) from None


def open_dashboard(address: str, token_file: Path | None) -> Dashboard:
    from bigtrain.jobs.cluster.dashboard import Dashboard

    dashboard = Dashboard(address, token_file)
    if dashboard.is_exposed:
        say("warning: the token is sent unencrypted to a public address: use TLS or a private network")
    return dashboard


@contextmanager
def view_of(name: str, address: str | None, token_file: Path | None, runs_dir: Path) -> Iterator[RunView]:
    """A context with the view of a run: on the cluster at `address`, or on this machine if `address` is None."""
    if address is None:
        from bigtrain.jobs.cluster.views import LocalView
        from bigtrain.run import find_run

        yield LocalView(find_run(name, runs_dir))
        return
    from bigtrain.jobs.cluster.views import cluster_view

    dashboard = open_dashboard(address, token_file)
    with reached(dashboard):
        yield cluster_view(dashboard, name)


def say(line: str) -> None:
    """Print a line to stderr, so that it does not mix with results on stdout."""
    print(line, file=enduring(sys.stderr), flush=True)


def required_address(address: str | None) -> str:
    from bigtrain.config import UserError

    if address is None:
        raise UserError(
            "No cluster is named",
            "--address",
            "Give --address http://HOST:8265 or set BIGTRAIN_ADDRESS. On this machine: `bigtrain train`, and `bigtrain "
            "run` for a script of your own.",
        )
    return address


def status_line(row: dict[str, Any]) -> str:
    parts = [f"{row['name']}: {row['state']}"]
    rate_unit = (row.get("units") or {}).get("tokens_per_s", "tokens/s")
    for key, form in (
        ("step", "step {}"),
        ("loss", "loss {:.4f}"),
        ("tokens_per_s", f"{{:.0f}} {rate_unit}"),
        ("goodput", "goodput {:.0%}"),
        ("nodes", "{} nodes"),
        ("restarts", "{} restarts"),
        ("eta_s", "{:.0f} s left"),
        ("wandb_url", "{}"),
    ):
        if row.get(key) is not None:
            parts.append(form.format(row[key]))
    if row.get("forecast"):
        parts.append(_forecast_text(row["forecast"]))
    if row.get("refused"):
        why = row["refused"]["error"] or "it had nothing to do"
        parts.append(f"({row['refused']['submission']} did not start: {why})")
    if row.get("epochs"):
        parts.append("epochs " + ", ".join(f"{name} {count:.2f}" for name, count in row["epochs"].items()))
    return "  ".join(parts)


def _forecast_text(held: dict[str, Any]) -> str:
    if held["state"] == "changed":
        return "forecast CHANGED since the start"
    left = held["left"]
    if left is None:
        return f"forecast: {held['state']}"
    band = f"{left['low']:.4f} to {left['high']:.4f}"
    return f"forecast: left at step {left['step']}, {left['what']} {left['measured']:.4f} outside {band}"


def driver_lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """The lines that the driver prints, without those that Ray Jobs prints before them."""
    rest, begun = "", False
    for chunk in chunks:
        *lines, rest = (rest + chunk.decode(errors="replace")).split("\n")
        for line in lines:
            if begun:
                yield line
            begun = begun or line.startswith("Running entrypoint for job ")
    if rest and begun:
        yield rest
