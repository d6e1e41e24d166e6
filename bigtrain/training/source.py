"""Resolves `init.source`, from which a run starts: another run's checkpoint, or a directory of Hugging Face weights."""

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
    """Hash of the checkpoint's manifest, which holds the hashes of all files of the checkpoint."""
    url: str | None = None
    """URL of the run on an object store, from which the checkpoint was fetched into `run`; None for a local run."""

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return RunDirectory(self.run).checkpoints

    @property
    def name(self) -> str:
        """The value of `init.source` that names this checkpoint."""
        return f"{self.url or self.run}@{self.step}"

    def content(self) -> str:
        """The hash to store in `init.hash`."""
        return self.hash


@dataclass(frozen=True)
class HfSource:
    """A directory of Hugging Face weights."""

    files: HfFiles

    @property
    def name(self) -> str:
        """The value of `init.source` that names this directory."""
        return str(self.files.directory)

    def content(self) -> str:
        """The hash to store in `init.hash`. This reads every byte of the weights."""
        return digest(self.files.file_hashes(self.files.all_files))


def resolve_source(text: str, runs_dir: Path) -> CheckpointSource | HfSource:
    """Resolve the text of `init.source` to a checkpoint or to a directory of Hugging Face weights.

    Args:
        text: RUN, RUN@STEP or RUN@best, where RUN is a name, a path or a URL; or a directory of Hugging Face weights.
            The checkpoint of a URL is fetched.
        runs_dir: The directory in which runs are found by name.

    Raises:
        UserError: There is no such run, or the run has no such checkpoint.
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
            f"Choose one of these steps: {', '.join(map(str, steps))}.",
        )
    path = next(checkpoint.path for checkpoint in found if checkpoint.step == step)
    url = name.rstrip("/") if is_url(name) else None
    return CheckpointSource(run.path.absolute(), step, storage.hash_file(path / MANIFEST_NAME), url)


def is_fresh(name: str, init: InitConfig) -> bool:
    """Whether `init.fresh` matches a parameter's qualified name, so that it is initialized from the seed."""
    return any(fnmatchcase(name, pattern) for pattern in init.fresh)


def check_fresh(names: Collection[str], init: InitConfig) -> None:
    """Refuse a pattern of `init.fresh` that no parameter matches.

    Raises:
        UserError: A pattern matches no parameter; the error names the nearest one.
    """
    for number, pattern in enumerate(init.fresh):
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names)
            raise UserError(
                f"the pattern {pattern!r} matches no parameter",
                f"init.fresh.{number}",
                f"The nearest name is {near!r}." if near else None,
            )


def check_hf_source(source: HfSource, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]] | None,
                    init: InitConfig) -> None:  # fmt: skip
    """Refuse Hugging Face weights that the model cannot start from. Only the headers of the files are read.

    Args:
        shapes: Shapes of the model's parameters by qualified name; None if only the built model knows them.

    Raises:
        UserError: `init.state` requests more than weights, or the weights do not fit the model.
    """
    if init.state != "weights":
        raise UserError(
            f"init.state is {init.state}, but {source.name} holds only weights",
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
