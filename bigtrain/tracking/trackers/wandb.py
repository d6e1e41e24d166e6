"""The Weights & Biases tracker. Only this module imports wandb, and only in the tracker's own process."""

from __future__ import annotations

import netrc
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from bigtrain.storage import write_atomic
from bigtrain.tracking.config import PICTURE_KEY, TRACKERS, TrackedRun, Tracker, TrackerConfig, TrackingConfig
from bigtrain.tracking.pictures import note_of
from bigtrain.tracking.process import TrackerProcess

INIT_TIMEOUT_S = 60.0
MAX_TEMPORARY_PATH = 56
LOG_FLUSH_INTERVAL_S = 2.0
"""Seconds between two writes to RUN/wandb; a kill may lose the data of this time."""
_DEFAULT_BASE_URL = "https://api.wandb.ai"
_MAX_ID_LENGTH = 64


@TRACKERS.register
class WandbConfig(TrackerConfig):
    """Logs to one W&B run for each run, which a resume continues. If W&B cannot be reached at the start, the run is
    logged offline."""

    label: ClassVar[str] = "W&B"
    advice: ClassVar[str] = "`wandb sync` sends the run later"

    name: Literal["wandb"] = "wandb"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: WANDB_MODE if set; else online if there is a key in WANDB_API_KEY or the netrc file, else offline."""
    project: str = "bigtrain"
    """W&B project of the run."""
    entity: str | None = None
    """W&B user or team that owns the project; null: the default of the API key."""
    tags: tuple[str, ...] = ()
    """W&B tags of the run."""
    group: str | None = None
    """W&B group of the run, such as the sweep to which it belongs."""
    init_timeout_s: float = INIT_TIMEOUT_S
    """Seconds that W&B's start may take before the run is logged offline."""

    def starts(self, run: TrackedRun) -> list[dict[str, Any]]:
        """The alternatives of the mode: for online first online, then offline; none if disabled."""
        mode = choose_mode(self.mode, os.environ)
        modes = {"online": ["online", "offline"], "offline": ["offline"]}.get(mode, [])
        start = {"id": run_id(run.directory, run.name), "trainer_pid": os.getpid()} if modes else {}
        return [{**start, "mode": mode} for mode in modes]

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables that put W&B's sockets and temporary files into the run's directory.

        So a kill leaves no files elsewhere. The path of a socket may have at most 107 characters; if the directory's
        path is too long, the system's temporary directory is used.
        """
        # W&B's client sends no error reports of its own.
        variables = {"WANDB_ERROR_REPORTING": os.environ.get("WANDB_ERROR_REPORTING", "false")}
        place = folder.resolve() / "tmp"
        shutil.rmtree(place, ignore_errors=True)
        if len(str(place)) > MAX_TEMPORARY_PATH:
            return variables
        place.mkdir(parents=True, exist_ok=True)
        return {**variables, "TMPDIR": str(place)}

    def open(self, run: TrackedRun, start: dict[str, Any]) -> Tracker:
        """Start or resume the W&B run."""
        return _Wandb(self, run, start)


class _Wandb(Tracker):
    def __init__(self, keys: WandbConfig, run: TrackedRun, start: dict[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            init_timeout=keys.init_timeout_s,
            login_timeout=keys.init_timeout_s,
            save_code=False,
            silent=True,
            x_stats_pid=start["trainer_pid"],
            x_transaction_log_flush_interval=LOG_FLUSH_INTERVAL_S,
        )
        self._run: Any = wandb.init(
            dir=str(run.directory), id=start["id"], name=run.name, mode=start["mode"], project=keys.project,
            entity=keys.entity, tags=list(keys.tags), group=keys.group, config=dict(run.config), resume="allow",
            settings=settings,
        )  # fmt: skip
        if start["mode"] == "online" and self._run.url:
            write_atomic(run.directory / "wandb" / "url", self._run.url + "\n")
        self._first_free = int(self._run.step)

    def log(self, row: dict[str, Any]) -> None:
        media = {key: _media(value) for key, value in row.items() if key != "step"}
        values = {key: value for key, value in media.items() if value is not None}
        # After a resume from an older checkpoint W&B already has these steps, and it refuses to log them again.
        if row["step"] >= self._first_free:
            self._run.log(values, step=row["step"])

    def alert(self, title: str, text: str, level: str) -> None:
        self._run.alert(title=title, text=text, level=level)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _media(value: Any) -> Any:
    """Convert {"_wandb_table": columns, "rows": ...}, {"_wandb_html": path} and images to W&B's objects.

    Other values are returned unchanged. The result is None for an image whose file does not exist any more.
    """
    if isinstance(value, dict) and "_wandb_table" in value:
        import wandb

        return wandb.Table(columns=value["_wandb_table"], data=value["rows"])
    if isinstance(value, dict) and "_wandb_html" in value:
        import wandb

        return wandb.Html(Path(value["_wandb_html"]).read_text(encoding="utf-8"), inject=False)
    if isinstance(value, dict) and PICTURE_KEY in value:
        import wandb

        place = Path(value[PICTURE_KEY])
        return wandb.Image(str(place), caption=note_of(place) or None) if place.exists() else None
    return value


def has_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B would find an API key, in WANDB_API_KEY or in the netrc file under the name of its server."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL", _DEFAULT_BASE_URL)).hostname or ""
    path = environment.get("NETRC") or os.path.join(environment.get("HOME", ""), ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def choose_mode(wanted: str, environment: Mapping[str, str]) -> str:
    """The mode "online", "offline" or "disabled"; "auto" is WANDB_MODE if set, else it depends on an API key."""
    if wanted != "auto":
        return wanted
    if environment.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return environment["WANDB_MODE"]
    return "online" if has_key(environment) else "offline"


def run_id(run_dir: Path, name: str) -> str:
    """The W&B id of a run: its name with a random suffix, generated once and stored in RUN/wandb/id.

    The suffix distinguishes runs of the same name by several users in one project.
    """
    file = run_dir / "wandb" / "id"
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[: _MAX_ID_LENGTH - 9]
    inode = str(run_dir.stat().st_ino) if run_dir.exists() else ""
    kept, _, made_in = file.read_text().strip().partition("\n") if file.exists() else ("", "", "")
    # A renamed directory keeps its inode. A copy under another name is another run, so it gets a new id.
    if kept and (made_in == inode or kept.rpartition("-")[0] == stem):
        return kept
    fresh = f"{stem}-{secrets.token_hex(4)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, f"{fresh}\n{run_dir.stat().st_ino}\n")
    return fresh


def read_url(run_dir: Path) -> str | None:
    """URL of the run on W&B, or None if it has never been online."""
    try:
        return (run_dir / "wandb" / "url").read_text().strip() or None
    except FileNotFoundError:
        return None


def send_alert(
    run_dir: Path,
    config: Mapping[str, Any],
    tracking: TrackingConfig,
    *,
    title: str,
    text: str,
    failed: bool,
    timeout_s: float,
    init_timeout_s: float | None = None,
) -> str | None:
    """Make W&B notify the user about a run that has ended, and wait until the notification has been sent.

    Args:
        run_dir: The run's directory.
        config: The run's config.
        tracking: The section `tracking`.
        title: Title of the notification.
        text: Text of the notification.
        failed: Whether the run has failed.
        timeout_s: Longest wait in seconds.
        init_timeout_s: Seconds that W&B's start may take; None: half of `timeout_s`.

    Returns:
        None if W&B has received the notification, otherwise the reason why not. Then it is in the run's offline files,
        for `wandb sync`.
    """
    warnings: list[str] = []
    keys = WandbConfig(
        mode="online",
        project=tracking.project,
        entity=tracking.entity,
        tags=tuple(tracking.tags),
        init_timeout_s=timeout_s / 2 if init_timeout_s is None else init_timeout_s,
    )
    tracker = TrackerProcess(keys, TrackedRun(run_dir, str(config["name"]), config), warn=warnings.append)
    tracker.put({"alert": {"title": title, "text": text, "level": "ERROR" if failed else "INFO"}, "failed": failed})
    tracker.close(timeout_s)
    return warnings[0] if warnings else None
