"""The packages that a submission uploads: bigtrain's source, which the cluster caches, and the request with its files.

Both are zip files whose names contain the hash of their content. Ray unpacks them on each node that runs the job.
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
"""Largest size of a working directory that the user ships with a script."""
REQUEST_NAME: Final = "bigtrain_request.json"
CONFIG_NAME: Final = "bigtrain_config.yaml"
PLUGIN_DIRECTORY: Final = "bigtrain_plugin"
WORK_NAME: Final = "bigtrain_work.tar"
"""Name of a tar file with the user's files; Ray itself would drop links and empty directories."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
_SKIPPED = ("__pycache__", ".git", ".venv", "node_modules")


@dataclass(frozen=True)
class Script:
    """A user's own script that is submitted to a cluster."""

    name: str
    """The script's name in the run's record: its path in the shipped directory, or the name of its module."""
    call: ScriptCall
    """How to call the script from the client's working directory."""
    sha256: str | None = None
    """Hash of the script's file, by which a node checks that it sees the same file; None for a module."""


@dataclass(frozen=True)
class Request:
    """The data that the client sends to the driver; the run's config is sent as a separate file."""

    id: str
    """Id of the submission: NAME-NUMBER."""
    name: str
    """Name of the run."""
    runs_dir: str
    """Directory of runs on the nodes."""
    submitted: float
    """Time of the submission in seconds since the epoch, by the client's clock."""
    versions: dict[str, str]
    """The client's versions of python, ray, torch and bigtrain."""
    secrets_file: str | None = None
    """Path of a file with secrets on the nodes."""
    max_duration_s: float | None = None
    """Seconds after which the run is stopped; None: never."""
    plugin: str | None = None
    """The shipped plugin's path under PLUGIN_DIRECTORY, or the name of a module that is installed on the nodes."""
    resume: bool = False
    """Whether to use the config that the run recorded, instead of a shipped one."""
    step: int | None = None
    """If not None, the run goes back to the checkpoint of this step."""
    doctor: bool = False
    """Whether to examine the nodes instead of training."""
    script: Script | None = None
    """The user's own script, if the submission is one."""
    job: dict[str, Any] = field(default_factory=dict)
    """The `job` section, for a script."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables that the user sets for the ranks of a run."""

    def dump(self) -> bytes:
        """Serialise the request to JSON, as the file REQUEST_NAME holds it."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def load(cls, path: Path) -> Request:
        """Read a request from a file."""
        value = json.loads(path.read_text())
        script = value.pop("script")
        if script is not None:
            script = Script(**{**script, "call": ScriptCall(**script["call"])})
        return cls(**value, script=script)


@dataclass(frozen=True)
class Package:
    """A zip file and its name, which contains the hash of its content."""

    name: str
    data: bytes

    @property
    def uri(self) -> str:
        """The package's URI in a Ray runtime environment."""
        return f"gcs://{self.name}"


def make_package(files: Iterable[tuple[str, bytes]]) -> Package:
    """Zip files, given as pairs (path, content); equal files make equal packages."""
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
    """The package with bigtrain's own source, without tests and data."""
    root = Path(__file__).resolve().parents[2]
    return make_package(_files(root, root.parent))


def work_archive(base: Path, paths: Iterable[Path]) -> bytes:
    """A tar archive of a user's files and directories, with modes and links; equal files make equal archives.

    A link to a file outside of `base` is replaced by that file; all other links are kept.

    Args:
        base: Directory to which the names in the archive are relative.
        paths: The files and directories, all below `base`.

    Raises:
        UserError: The files are larger than MAX_BYTES in total.
    """
    buffer = io.BytesIO()
    total = 0
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in paths:
            outside = path.is_symlink() and path.is_file() and not path.resolve().is_relative_to(base.resolve())
            entry = archive.gettarinfo(path.resolve() if outside else path, str(path.relative_to(base)))
            if entry is None:  # A socket, which tar cannot store.
                continue
            entry.mtime = entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            if entry.islnk():  # A second hard link of one file is stored as a separate file.
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
    """The `work_archive` of a directory that a user ships with a script.

    Raises:
        UserError: The files are larger than MAX_BYTES in total.
    """
    return work_archive(directory, _walk(directory, lambda path: True))


def plugin_files(place: str) -> tuple[str, list[tuple[str, bytes]]]:
    """The names of plugins on the nodes, and the files to ship; an installed module needs no files.

    Args:
        place: One or several plugins, in the format of `load_plugin`.

    Returns:
        The names, joined by os.pathsep, and the files as pairs (path, content).

    Raises:
        UserError: Two plugins have the same file name.
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
    """The versions of python, bigtrain, ray and torch on this machine, found without importing ray or torch."""
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
