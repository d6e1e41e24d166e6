"""What a submission carries to the cluster: bigtrain's source, which is kept there, and the request.

Both are zip files, named after their content; Ray unpacks them on each node that runs something of the job.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import bigtrain
from bigtrain.config import UserError
from bigtrain.jobs.scripts.call import ScriptCall

MAX_BYTES: Final = 50_000_000
"""Of a working directory that the user ships with a script."""
REQUEST_NAME: Final = "bigtrain_request.json"
CONFIG_NAME: Final = "bigtrain_config.yaml"
PLUGIN_DIRECTORY: Final = "bigtrain_plugin"
WORK_NAME: Final = "bigtrain_work.tar"
"""The user's files, in a tar of their own: Ray drops links and empty directories."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
_SKIPPED = ("__pycache__", ".git", ".venv", "node_modules")


@dataclass(frozen=True)
class Script:
    """A user's own script and what was shipped of it."""

    name: str
    """What the run's record calls it: its path in the shipped directory, or the name of its module."""
    call: ScriptCall
    """How to call it from the client's directory."""
    sha256: str | None = None
    """Of its file, by which a node knows whether it sees the same; None for a module."""


@dataclass(frozen=True)
class Request:
    """What the driver gets; the config travels beside it as a file."""

    id: str
    """NAME-ATTEMPT."""
    name: str
    runs_dir: str
    """On the nodes."""
    submitted: float
    """Seconds since the epoch, by the client's clock."""
    versions: dict[str, str]
    """What the client has: python, ray, torch, bigtrain."""
    secrets_file: str | None = None
    max_duration_s: float | None = None
    plugin: str | None = None
    """The shipped plugin's path under PLUGIN_DIRECTORY, or the name of a module that is installed on the nodes."""
    resume: bool = False
    """Take the config that the run recorded, not a shipped one."""
    step: int | None = None
    """Go back to the checkpoint of this step."""
    doctor: bool = False
    """Examine the nodes, and train nothing."""
    script: Script | None = None
    job: dict[str, Any] = field(default_factory=dict)
    """The `job` section, for a script."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the user sets for the ranks of a run."""

    def dump(self) -> bytes:
        """As REQUEST_NAME holds it."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def load(cls, path: Path) -> Request:
        """Read it back."""
        value = json.loads(path.read_text())
        script = value.pop("script")
        if script is not None:
            script = Script(**{**script, "call": ScriptCall(**script["call"])})
        return cls(**value, script=script)


@dataclass(frozen=True)
class Package:
    """A zip file and its name, which tells its content."""

    name: str
    data: bytes

    @property
    def uri(self) -> str:
        """As a runtime environment names it."""
        return f"gcs://{self.name}"


def make_package(files: Iterable[tuple[str, bytes]]) -> Package:
    """Zip files, (path, content) each, so that equal files make equal packages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in sorted(files):
            entry = zipfile.ZipInfo(path, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    data = buffer.getvalue()
    return Package(f"_ray_pkg_{hashlib.sha256(data).hexdigest()[:32]}.zip", data)


def source_package() -> Package:
    """bigtrain's own source: the package alone, no tests, no data."""
    root = Path(__file__).resolve().parents[2]
    return make_package(_files(root, root.parent))


def work_archive(base: Path, paths: Iterable[Path]) -> bytes:
    """A tar of a user's files and directories with their modes and links; equal files make equal archives.

    A link to a file outside of `base` becomes that file; any other link stays one.

    Args:
        base: Names in the archive are relative to it.

    Raises:
        UserError: They are more than MAX_BYTES.
    """
    buffer = io.BytesIO()
    total = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            outside = path.is_symlink() and path.is_file() and not path.resolve().is_relative_to(base.resolve())
            entry = archive.gettarinfo(path.resolve() if outside else path, str(path.relative_to(base)))
            if entry is None:  # A socket.
                continue
            entry.mtime = entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            if entry.islnk():  # The second name of one file: a file of its own here.
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            total += entry.size
            if total > MAX_BYTES:
                raise UserError(
                    f"{base} holds more than {MAX_BYTES / 1e6:.0f} MB",
                    str(path),
                    "Ship source alone; data belongs on storage that the nodes share.",
                )
            if entry.isreg():
                with open(path, "rb") as file:
                    archive.addfile(entry, file)
            else:
                archive.addfile(entry)
    return buffer.getvalue()


def directory_archive(directory: Path) -> bytes:
    """`work_archive` of a directory that a user ships with a script.

    Raises:
        UserError: See `work_archive`.
    """
    return work_archive(directory, _walk(directory, lambda path: True))


def plugin_files(place: str) -> tuple[str, list[tuple[str, bytes]]]:
    """Plugins as the nodes will name them, and what is to be shipped: nothing for an installed module.

    Args:
        place: One plugin or several, as `load_plugin` takes them.

    Raises:
        UserError: Two of them have the same file name.
    """
    names: list[str] = []
    files: list[tuple[str, bytes]] = []
    for one in place.split(os.pathsep):
        path = Path(one)
        is_path = path.is_dir() or path.suffix == ".py"
        names.append(path.resolve().name if is_path else one)
        if path.is_dir():
            files += [(f"{PLUGIN_DIRECTORY}/{name}", data) for name, data in _files(path, path.parent)]
        elif is_path:
            files.append((f"{PLUGIN_DIRECTORY}/{path.name}", path.read_bytes()))
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"Two plugins are called {name}", "--plugin", "Rename one of them.")
    return os.pathsep.join(names), files


def versions() -> dict[str, str]:
    """What a run's numbers and processes depend on, without importing any of it."""
    found = {"python": platform.python_version(), "bigtrain": bigtrain.__version__}
    for name in ("ray", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _walk(directory: Path, wanted: Callable[[Path], bool]) -> Iterable[Path]:
    for path in sorted(directory.rglob("*")):
        if wanted(path) and not any(part in _SKIPPED for part in path.relative_to(directory).parts):
            yield path


def _files(directory: Path, base: Path) -> Iterable[tuple[str, bytes]]:
    for path in _walk(directory, Path.is_file):
        yield str(path.relative_to(base)), path.read_bytes()
