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
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import bigtrain
from bigtrain.config import UserError

MAX_BYTES: Final = 50_000_000
"""Of a working directory that the user ships with a script."""
REQUEST_NAME: Final = "bigtrain_request.json"
CONFIG_NAME: Final = "bigtrain_config.yaml"
PLUGIN_DIRECTORY: Final = "bigtrain_plugin"

_EPOCH = (1980, 1, 1, 0, 0, 0)
_SKIPPED = ("__pycache__", ".git", ".venv", "node_modules")


@dataclass(frozen=True)
class Script:
    """A user's own script and how many ranks of it there are."""

    file: str
    """Its path within the shipped working directory."""
    arguments: list[str]
    sha256: str


@dataclass(frozen=True)
class Request:
    """What the driver is told; the config travels beside it as a file."""

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

    def dump(self) -> bytes:
        """As REQUEST_NAME holds it."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def load(cls, path: Path) -> Request:
        """Read it back."""
        value = json.loads(path.read_text())
        script = value.pop("script")
        return cls(**value, script=None if script is None else Script(**script))


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


def directory_files(directory: Path) -> list[tuple[str, bytes]]:
    """The files of a directory that a user ships with a script, by their paths in it.

    Raises:
        UserError: They are more than MAX_BYTES.
    """
    total = 0
    for path in _walk(directory):
        total += path.stat().st_size
        if total > MAX_BYTES:
            raise UserError(
                f"{directory} holds more than {MAX_BYTES / 1e6:.0f} MB",
                str(path),
                "Ship source alone; data belongs on storage that the nodes share.",
            )
    return list(_files(directory, directory))


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


def _walk(directory: Path) -> Iterable[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not any(part in _SKIPPED for part in path.relative_to(directory).parts):
            yield path


def _files(directory: Path, base: Path) -> Iterable[tuple[str, bytes]]:
    for path in _walk(directory):
        yield str(path.relative_to(base)), path.read_bytes()
