"""A W&B project as a table of runs, through W&B's public API."""

from __future__ import annotations

from typing import Any

from bigtrain.config import UserError
from bigtrain.scaling.runs.columns import Columns, flatten, rows_to_columns


def read_project(path: str) -> tuple[Columns, list[str]]:
    """Read the finished runs of a W&B project, one row per run, with the columns of its config and its summary.

    The summary has priority over the config.

    Args:
        path: ENTITY/PROJECT, or PROJECT of the default entity.

    Returns:
        The columns, and the id of each row's run.

    Raises:
        UserError: The project cannot be read.
    """
    import wandb

    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        for run in wandb.Api().runs(path, filters={"state": "finished"}):
            config = {name: value for name, value in dict(run.config).items() if not name.startswith("_")}
            summary = {name: value for name, value in dict(run.summary).items() if not name.startswith("_")}
            group = {"wandb_group": run.group} if run.group else {}
            rows.append((run.id, {**flatten(config), **flatten(summary), "run": run.name or run.id, **group}))
    except (wandb.Error, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"The W&B project cannot be read: {reason}", f"wandb:{path}",
            "Check ENTITY/PROJECT and WANDB_API_KEY, or read W&B's offline files, which need no key.",
        ) from None  # fmt: skip
    return rows_to_columns(rows)
