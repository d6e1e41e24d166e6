"""`init.source`: another run's checkpoint, or a directory of Hugging Face weights, as what a run begins with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bigtrain import storage
from bigtrain.checkpoint import commit
from bigtrain.checkpoint.manifest import MANIFEST_NAME
from bigtrain.checkpoint.restore import weights_at
from bigtrain.config import UserError, nearest
from bigtrain.config.urls import is_url
from bigtrain.models.config import ModelConfig
from bigtrain.models.hf_files import HfFiles, digest
from bigtrain.run import RunDirectory
from bigtrain.training.config import InitConfig


@dataclass(frozen=True)
class CheckpointSource:
    """One checkpoint of one run."""

    run: Path
    step: int
    hash: str
    """Hash of its manifest, which holds the hashes of all its files."""
    url: str | None = None
    """Of the run, where it lies on an object store, and `run` is what was fetched of it."""

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return RunDirectory(self.run).checkpoints

    @property
    def name(self) -> str:
        """What `init.source` names it by."""
        return f"{self.url or self.run}@{self.step}"

    def content(self) -> str:
        """The hash that `init.hash` holds."""
        return self.hash


@dataclass(frozen=True)
class HfSource:
    """A directory of Hugging Face weights."""

    files: HfFiles

    @property
    def name(self) -> str:
        """What `init.source` names it by."""
        return str(self.files.directory)

    def content(self) -> str:
        """The hash that `init.hash` holds; reads every byte."""
        return digest(self.files.file_hashes(self.files.all_files))


def resolve_source(text: str, runs_dir: Path) -> CheckpointSource | HfSource:
    """A checkpoint, or a directory of Hugging Face weights.

    Args:
        text: RUN, RUN@STEP or RUN@best, by name, path or URL, of which the checkpoint is fetched; or the directory.

    Raises:
        UserError: No such run, or no such step.
    """
    weights = weights_at(text, runs_dir)
    if isinstance(weights, HfFiles):
        return HfSource(weights)
    run, step = weights
    name = text.rpartition("@")[0] or text
    found = commit.list_checkpoints(run.checkpoints)
    steps = [checkpoint.step for checkpoint in found]
    if not steps:
        raise UserError(f"init.source: the run '{name}' has no checkpoint", str(run.path))
    if step is None:
        step = max(steps)
    if step not in steps:
        raise UserError(
            f"init.source: the run '{name}' has no checkpoint of step {step}",
            str(run.checkpoints),
            f"It has {', '.join(map(str, steps))}.",
        )
    path = next(checkpoint.path for checkpoint in found if checkpoint.step == step)
    url = name.rstrip("/") if is_url(name) else None
    return CheckpointSource(run.path.absolute(), step, storage.hash_file(path / MANIFEST_NAME), url)


def is_fresh(name: str, init: InitConfig) -> bool:
    """Whether a parameter, by its qualified name, is initialized from the seed although there is a source."""
    return any(fnmatchcase(name, pattern) for pattern in init.fresh)


def check_fresh(names: Collection[str], init: InitConfig) -> None:
    """Refuse a pattern of `init.fresh` that no parameter matches.

    Raises:
        UserError: Names the nearest parameter.
    """
    for number, pattern in enumerate(init.fresh):
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names)
            raise UserError(
                f"the pattern {pattern!r} matches no parameter",
                f"init.fresh.{number}",
                f"the nearest name is {near!r}" if near else None,
            )


def check_hf_source(source: HfSource, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]] | None,
                    init: InitConfig) -> None:  # fmt: skip
    """Refuse Hugging Face weights that the model cannot begin with, by the headers of their files.

    Args:
        shapes: Of the model's parameters; None where only the built model knows them.

    Raises:
        UserError: More than weights is requested, or they do not fit.
    """
    if init.state != "weights":
        raise UserError(
            f"init.state is {init.state}, and {source.name} holds weights alone",
            "init.state",
            "Set init.state to weights.",
        )
    wanted = {
        name: shape
        for name, shape in (shapes or {}).items()
        if not is_fresh(name, init)
        and not model.is_adapter(name)
        and not (init.new_rows is not None and model.has_vocabulary_rows(name))
    }
    source.files.check_fit(model, wanted)
