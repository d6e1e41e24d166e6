"""A run: *what* is trained and *how* it is run, the identity of the first, and the directory that holds it all."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import functools
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, get_args

from pydantic import SerializeAsAny, StringConstraints, create_model, field_validator

from bigtrain import storage
from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.config import BatchSize, Duration, Section, UserError, load, nearest, yaml_file
from bigtrain.data.config import DataConfig, StreamingConfig
from bigtrain.engines.config import EngineConfig, FSDPConfig, Precision
from bigtrain.jobs.config import JobConfig
from bigtrain.models.config import ModelConfig, families, family, preset, presets
from bigtrain.optim.config import AdamWConfig, ConstantConfig, OptimizerConfig, ScheduleConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.plugin import Plugin
from bigtrain.tracking.config import TrackingConfig
from bigtrain.training.config import BadStepsConfig, EvaluationConfig, InitConfig

FORMAT_VERSION = 1
MAX_NAMED = 10
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
LEASE_RENEWAL_S = 10.0
LEASE_LIFE_S = 60.0
"""A holder on another machine that has not renewed its lease for this long is dead."""


class ExitCode(enum.IntEnum):
    """How a command ends; the codes that scripts and schedulers act on."""

    FINISHED = 0
    FAILED = 1
    USER = 2
    STOPPED = 75


class BatchConfig(Section):
    """The global batch: what one optimizer step consumes, over all ranks together."""

    size: BatchSize
    """A number of sequences (12) or of tokens ("512k tokens")."""


class RunConfig(Section):
    """One run: the first ten keys say what is trained, the others how it is run."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the run: its directory, and its name in the tracker."""

    seed: int = 1337
    """The only source of randomness: initial weights, order of the samples, dropout."""

    model: SerializeAsAny[ModelConfig]
    """The architecture and its sizes, or `preset: NAME` with keys that override it."""

    data: DataConfig
    """The shards to train and to validate on."""

    batch: BatchConfig
    """Size of the global batch."""

    duration: Duration
    """Length of the training: "2000 steps", "1e9 tokens" or "3 epochs"."""

    optimizer: OptimizerConfig = AdamWConfig()
    """How gradients become updates."""

    schedule: ScheduleConfig = ConstantConfig()
    """How the learning rate changes over the run."""

    precision: Precision = "bf16"
    """Arithmetic of matmuls and residual stream: bf16, fp32, or fp16 with loss scaling."""

    init: InitConfig = InitConfig()
    """Where the state before the first step comes from."""

    streaming: StreamingConfig = StreamingConfig()
    """How shards are read."""

    engine: EngineConfig = FSDPConfig()
    """Who executes a step."""

    layout: LayoutConfig = LayoutConfig()
    """How model and batch lie on the ranks."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run saves itself, and what it keeps."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """When the held-out loss is measured."""

    bad_steps: BadStepsConfig = BadStepsConfig()
    """What is done about steps that are no numbers, or whose loss jumps."""

    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""

    job: JobConfig = JobConfig()
    """How many processes, and what is done when one dies."""

    @field_validator("duration")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        if value.is_time:
            raise ValueError(f"'{value}' is a time: give steps, tokens, samples or epochs")
        return value


WHAT = ("seed", "model", "data", "batch", "duration", "optimizer", "schedule", "precision", "init")
"""The keys that make a run's identity; all others say how it is run and may change on a resume."""


@functools.cache
def run_config(section: type[ModelConfig]) -> type[RunConfig]:
    """RunConfig with the `model` section of one family, so that its keys are typed and known by name.

    One class a family, so that equal configs compare equal.
    """
    arch = ", ".join(get_args(section.model_fields["arch"].annotation))
    return create_model(f"RunConfig[{arch}]", __base__=RunConfig, model=(section, RunConfig.model_fields["model"]))


def load_config(
    path: Path, overrides: list[str] | None = None, name: str | None = None, plugin: Plugin | None = None
) -> RunConfig:
    """Read, complete and check a run's YAML; paths in it become absolute.

    Args:
        plugin: The user's own model families.

    Raises:
        UserError: Anything wrong in the file, with its line; a model that comes with a plugin which is not given.
    """
    document = load.read_document(path, overrides or [])
    if name is not None:
        document.override(("name",), name)
    own = plugin.families if plugin else {}
    _require_plugin(document, path, own)
    return config_of(document, plugin)


def config_of(document: yaml_file.Document, plugin: Plugin | None = None) -> RunConfig:
    """The config that a parsed document holds; see `load_config`. The document's preset is written out in place."""
    kind = _complete_model(document, plugin.families if plugin else {})
    return _absolute(load.build(kind, document))


def _require_plugin(document: yaml_file.Document, path: Path, own: Mapping[str, type[ModelConfig]]) -> None:
    """Refuse the config of a run whose model came with a plugin, where it is not given again."""
    model = document.value.get("model")
    directory = RunDirectory(path.parent)
    if path.name != directory.config.name or not directory.exists() or not isinstance(model, dict):
        return
    arch, source = model.get("arch"), directory.read_record().get("plugin")
    if source is not None and arch not in own:
        raise UserError(
            f"The model of this run, arch '{arch}', is the user's own code, which is loaded only where it is named",
            str(path),
            f"Add --plugin {source['place']}",
        )


def _complete_model(document: yaml_file.Document, own: Mapping[str, type[ModelConfig]]) -> type[RunConfig]:
    """Lay the preset under the model's own keys; the typed config of its family."""
    model = document.value.get("model")
    if not isinstance(model, dict):
        raise UserError(
            "The key 'model' is missing" if model is None else "'model' must be a mapping of keys",
            document.where(("model",)),
            f"Give model: {{arch: NAME, ...}} with one of {', '.join(families())}, or model: {{preset: NAME}}.",
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
        raise UserError("The key 'model.arch' is missing", where, f"Known: {', '.join([*families(), *own])}.")
    try:
        return run_config(own.get(str(model["arch"])) or family(str(model["arch"])))
    except UserError as error:
        raise UserError(error.what, where, error.fix) from None


def _absolute(config: RunConfig) -> RunConfig:
    def absolute(path: str | None) -> str | None:
        return path if path is None or "://" in path else os.path.abspath(path)

    def absolute_places(value: Any) -> Any:
        if not isinstance(value, tuple):
            return absolute(value)
        # The name is written out: by its path alone it could become another one.
        return tuple(one.model_copy(update={"path": absolute(one.path), "name": one.source}) for one in value)

    data = config.data.model_copy(
        update={"train": absolute_places(config.data.train), "validation": absolute_places(config.data.validation)}
    )
    streaming = config.streaming.model_copy(update={"cache_dir": absolute(config.streaming.cache_dir)})
    return config.model_copy(update={"data": data, "streaming": streaming})


def what_is_trained(config: RunConfig, data: Mapping[str, Any], batch_sequences: int) -> dict[str, Any]:
    """The part of a config that makes its identity: data and source by content, no duration where that may grow.

    Args:
        data: What stands for the places of the data.
    """
    plain = config.plain()
    what = {key: plain[key] for key in WHAT}
    what["model"] = {**what["model"], **config.model.fingerprint()}
    if config.model.plugin is not None:
        what["model"]["plugin"] = config.model.plugin.sha256
    what["data"] = {**what["data"], **data}
    if what["data"]["consumed"] is None:
        del what["data"]["consumed"]
    what["batch"] = {"sequences": batch_sequences}
    what["init"] = {"source": config.init.hash, "state": config.init.state, "fresh": list(config.init.fresh)}
    if not config.schedule.ends_at_duration:
        del what["duration"]
    return what


def identity(what: dict[str, Any]) -> str:
    """The hash of what is trained: two runs of one identity compute the same losses."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """One line for each key that differs: "optimizer.lr: 0.001 -> 0.002"."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before if key in old else '(absent)'} -> {after if key in new else '(absent)'}"


class RunDirectory:
    """Where a run keeps everything: the names in it are the same for every run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.record = self.path / "run.json"
        self.lease = self.path / "lease.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.record.exists()

    def is_foreign(self) -> bool:
        """Whether this is no run, and holds more than a start that was killed leaves behind."""
        if self.exists() or not self.path.exists():
            return False
        ours = (self.config.name, self.lease.name, self.events.name)
        return not self.path.is_dir() or any(
            entry.name not in ours and not entry.name.startswith(tuple(f".{name}.tmp-" for name in ours))
            for entry in self.path.iterdir()
        )

    def event(self, event: str, /, **fields: Any) -> None:
        """Append one line to events.jsonl.

        Beside the time of day it carries the seconds since this machine's boot, and which boot: a clock that is set
        meanwhile changes no interval between events of one machine.
        """
        clock = {"uptime_s": round(time.monotonic(), 6), "boot": boot_hash()}
        storage.append_line(self.events, {"time": round(time.time(), 3), "event": event, **fields, **clock})

    def what(self) -> dict[str, Any]:
        """What this run trains, as it was recorded when it was first started."""
        record = self.read_record()
        return record["what"]

    def read_record(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            UserError: There is no run here, its record is damaged, or a newer bigtrain wrote it.
        """
        try:
            record = json.loads(self.record.read_text())
            version = int(record["format_version"])
            if version <= FORMAT_VERSION and not isinstance(record["what"], dict):
                raise TypeError("what is trained is not there")
        except FileNotFoundError:
            raise UserError(
                f"There is no run at {self.path}", fix="See the names under --runs-dir (default: runs/)."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                "run.json is damaged", str(self.record), "Restore it, or start again at another --name."
            ) from None
        if version > FORMAT_VERSION:
            raise UserError(
                f"run.json has format version {version}; this bigtrain reads up to {FORMAT_VERSION}",
                str(self.record),
                "Upgrade bigtrain.",
            )
        return record

    def check_identity(self, what: dict[str, Any], names: Mapping[str, str] | None = None) -> None:
        """Refuse to continue this run as another one.

        Args:
            names: What people call the data of a fingerprint.

        Raises:
            UserError: With the keys that differ.
        """
        changed = list(differences(self.what(), what))
        for fingerprint, name in (names or {}).items():
            changed = [line.replace(fingerprint, name) for line in changed]
        if changed:
            raise UserError(
                f"The run '{self.name}' trains something else:\n    " + "\n    ".join(changed),
                str(self.path),
                "Undo the change, give the run another --name, or start a new run from this one with --fork NEW.",
            )

    def write(self, config: RunConfig, what: dict[str, Any]) -> None:
        """Record the resolved config, where the model's code is, and on the first start what is trained."""
        self.path.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(self.config, yaml_file.dump(config.plain()))
        record = (
            self.read_record()
            if self.exists()
            else {"format_version": FORMAT_VERSION, "name": self.name, "identity": identity(what), "what": what}
        )
        plugin = config.model.plugin
        known = record | ({"plugin": asdict(plugin)} if plugin is not None else {})
        if not self.exists() or known != record:
            storage.write_json(self.record, known)


def find_run(run: str, runs_dir: Path) -> RunDirectory:
    """The directory of a run given by its name under `runs_dir`, or by a path.

    Raises:
        UserError: There is none; names the nearest run.
    """
    for path in (runs_dir / run, Path(run)):
        if (path / "run.json").exists():
            return RunDirectory(path)
    names = [path.parent.name for path in runs_dir.glob("*/run.json")]
    close = nearest(run, names)
    known = f"There are: {', '.join(sorted(names)[:MAX_NAMED])}." if names else "There are none; see --runs-dir."
    raise UserError(f"There is no run '{run}'", str(runs_dir), f"Did you mean '{close}'?" if close else known)


def list_runs(runs_dir: Path) -> list[RunDirectory]:
    """Every run under a directory, by name."""
    return [RunDirectory(path.parent) for path in sorted(runs_dir.glob("*/run.json"))]


def config_schema(plugin: Plugin | None = None) -> dict[str, Any]:
    """JSON Schema of a run's YAML: any family's `model` section, or a preset with keys that override it."""
    sections = {arch: family(arch) for arch in families()} | dict(plugin.families if plugin else {})
    schema = {**load.json_schema(RunConfig), "title": "bigtrain run"}
    choices = []
    for arch, section in sections.items():
        model = load.json_schema(section)
        schema["$defs"].update(model.pop("$defs", {}))
        del model["$schema"]
        model["properties"]["arch"] = {"const": arch, "type": "string"}
        model["anyOf"] = [{"required": sorted({"arch", *model.pop("required", [])})}]
        shapes = [name for name in presets() if preset(name)["arch"] == arch]
        if shapes:
            model["properties"]["preset"] = {"enum": shapes, "description": "A published shape; keys override it."}
            model["anyOf"].append({"required": ["preset"]})
        schema["$defs"][f"model.{arch}"] = model
        choices.append({"$ref": f"#/$defs/model.{arch}"})
    schema["properties"]["model"] = {"anyOf": choices, "description": RunConfig.model_fields["model"].description}
    return schema


def split_run_step(text: str) -> tuple[str, int | None]:
    """RUN@STEP as its two parts; the step is None where none is given."""
    match = re.fullmatch(r"(.+)@([0-9]+)", text)
    return (match[1], int(match[2])) if match else (text, None)


@dataclass(frozen=True)
class LeaseHolder:
    """The process that may write to a run directory."""

    number: int
    host: str
    boot: str
    pid: int
    started: int
    renewed: float

    @classmethod
    def parse(cls, value: dict[str, Any]) -> LeaseHolder:
        """The content of lease.json; a ValueError or TypeError where it is damaged."""
        holder = cls(**value)
        numbers = (holder.number, holder.pid, holder.started, holder.renewed)
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise TypeError("a field of the lease is no number")
        return holder

    def is_here(self) -> bool:
        """Whether its process, where it lives, is one of this machine and of this boot."""
        return (self.host, self.boot) == (socket.gethostname(), _boot_id())

    def alive(self) -> bool:
        """Whether the holder still runs: by its process here, by its last renewal on another machine."""
        if self.pid == 0:
            return False
        if self.is_here():
            return _process_start(self.pid) == self.started
        # A renewal in the future says that a clock was wrong, not that someone lives.
        return abs(time.time() - self.renewed) < LEASE_LIFE_S


class Leased(Protocol):
    """A directory that one process at a time may write to: a run's, or a sweep's."""

    path: Path
    lease: Path

    @property
    def name(self) -> str:
        """What people call it by."""
        ...


class Lease:
    """The right to write to a run directory; its number grows at every take-over and fences the last holder off."""

    def __init__(self, directory: Leased, number: int, predecessor: LeaseHolder | None = None) -> None:
        self.directory = directory
        self.number = number
        self.predecessor = predecessor
        """The holder that died without giving the lease back, where there was one."""
        self._released = threading.Event()

    @staticmethod
    def holder(directory: Leased) -> LeaseHolder | None:
        """Who holds, or last held, the lease."""
        try:
            return LeaseHolder.parse(json.loads(directory.lease.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    @classmethod
    def acquire(cls, directory: Leased, published: int = 0, noun: str = "run") -> Lease:
        """Take the lease of a run directory.

        Args:
            published: The highest number under which a checkpoint was published, should lease.json be lost.
            noun: What the directory is, for the message.

        Raises:
            UserError: A live process holds it.
        """
        directory.path.mkdir(parents=True, exist_ok=True)
        with _exclusive(directory.path):
            last = cls.holder(directory)
            if last is not None and last.alive():
                raise in_use(directory, last, noun)
            dead = last if last is not None and last.pid else None
            lease = cls(directory, max(last.number if last else 0, published) + 1, dead)
            lease._write(os.getpid())
        return lease

    def held(self) -> bool:
        """Whether no one has taken the lease over."""
        holder = self.holder(self.directory)
        return holder is not None and holder.number == self.number

    def release(self) -> None:
        """Give the lease back, keeping its number."""
        self._released.set()
        # Where it cannot be written, the end of this process gives the lease back.
        with contextlib.suppress(OSError), _exclusive(self.directory.path):
            if self.held():
                self._write(0)

    def keep(self) -> None:
        """Renew the lease in the background until it is released or lost."""

        def renew() -> None:
            while not self._released.wait(LEASE_RENEWAL_S):
                with contextlib.suppress(OSError), _exclusive(self.directory.path):
                    if self._released.is_set() or not self.held():
                        return
                    self._write(os.getpid())

        threading.Thread(target=renew, name="lease", daemon=True).start()

    def _write(self, pid: int) -> None:
        started = _process_start(pid) or 0 if pid else 0
        holder = LeaseHolder(self.number, socket.gethostname(), _boot_id(), pid, started, time.time())
        storage.write_json(self.directory.lease, holder.__dict__)


def in_use(directory: Leased, holder: LeaseHolder, noun: str = "run") -> UserError:
    """The refusal of a directory that someone else holds."""
    command = "bigtrain stop" if noun == "run" else f"bigtrain {noun} stop"
    return UserError(
        f"The {noun} '{directory.name}' is in use by process {holder.pid} on {holder.host}",
        str(directory.path),
        f"Wait for it, stop it with `{command} {directory.name}`, or choose another --name.",
    )


def lease_check(directory: RunDirectory, number: int) -> Callable[[], bool]:
    """A check for a rank: whether the gang it belongs to still holds the run."""
    return Lease(directory, number).held


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of a directory itself, so that no lock file is left in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _boot_id() -> str:
    """This boot of this machine, and the namespace in which process ids mean what they mean here."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def boot_hash() -> str:
    """A short name for this boot of this machine, by which intervals of its monotonic clock are known to be one's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(boot.encode()).hexdigest()[:12]


def _process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, which tells it from a later one of the same id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
