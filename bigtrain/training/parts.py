"""The parts of a training run for a custom training loop: engine, loader, schedule, saves.

    with TrainingParts(config, run_directory) as parts:
        for batch in parts.batches():
            result = parts.engine.train_step(batch.step, batch.micro_batches, parts.lr(batch.step))
            parts.finish_step(result)
            if parts.step % 100 == 0:
                parts.save()

This loop gives bitwise the same results as `bigtrain train`. It lacks what the trainer adds: metrics, evaluations,
callbacks, the policy for bad steps, and restarts.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from bigtrain import storage
from bigtrain.checkpoint import commit
from bigtrain.checkpoint.saver import Saver
from bigtrain.config import yaml_file
from bigtrain.data.loader import Loader, StepBatch
from bigtrain.engines.contract import Engine, StepNumbers, StepResult
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import Lease, RunConfig, RunDirectory
from bigtrain.training.prepare import Prepared, loader_options, prepare
from bigtrain.training.progress import Progress, as_plain
from bigtrain.training.restoring import Restoring


class TrainingParts:
    """The parts that a training loop needs on this rank. Leaving the context waits for the last save.

    Without torchrun, one process trains alone; under torchrun, each process is one rank.

    Args:
        config: The run's config.
        directory: The run directory. If it already holds a run, this run is resumed.

    Raises:
        UserError: The config or the data is invalid, another process trains this run, or the run in the directory
            trains something else.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self.ranks = Ranks.from_environment()
        self.prepared = prepare(config, verify=self.ranks.rank == 0)
        self.config, self.directory = self.prepared.config, directory
        self._lease = self._hold() if self.ranks.rank == 0 else None
        self.engine: Engine = config.engine.build(
            config.model, self.prepared.outputs, config.optimizer, layout=config.layout, precision=config.precision,
            seed=config.seed, ranks=self.ranks,
        )  # fmt: skip
        self.loader = Loader(self.prepared.sources, self.prepared.order, **reading(self.prepared, self.engine))
        self._saver = Saver(directory.checkpoints, config.checkpoint, may_publish=self._may_publish)
        self.progress: Progress = Restoring(self.engine, config, directory, self._event).start()

    def __enter__(self) -> TrainingParts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._saver.close()
            self.engine.close()
        self.loader.close()
        if self._lease is not None:
            self._lease.release()

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.progress.step

    @property
    def total_steps(self) -> int:
        """The run's `duration` in steps."""
        return self.prepared.total_steps

    def lr(self, step: int) -> float:
        """The learning rate of a step; steps are counted from 0."""
        return self.prepared.schedule.lr(step)

    def batches(self) -> Iterator[StepBatch]:
        """Yield this rank's batches of the remaining steps."""
        return self.loader.batches(self.step, self.total_steps)

    def finish_step(self, result: StepResult) -> StepNumbers:
        """Wait for a step, count it, and return its results; `loss / weight` of them is the mean loss."""
        numbers = result.read()
        self.progress.step += 1
        self.progress.tokens += numbers.weight
        self.progress.drawn = self.loader.position(self.progress.step)["drawn"]
        return numbers

    def save(self) -> None:
        """Save weights, optimizer state and position, in the background if the config says so. Collective.

        `bigtrain train` and `bigtrain resume` can continue from this checkpoint.
        """
        self._saver.save(
            self.step,
            self.engine.state(),
            progress={**as_plain(self.progress), "sources": self.prepared.fingerprints},
            config_hash=storage.hash_text(yaml_file.dump(self.config.plain())),
            identity=self.directory.read_record()["identity"],
            mesh=vars(self.config.layout.mesh(self.ranks.world_size)),
            lease=0 if self._lease is None else self._lease.number,
        )

    def _hold(self) -> Lease:
        """Take the run's lease and record the run."""
        directory = self.directory
        if directory.exists():
            directory.check_identity(self.config, self.prepared.what)
        lease = Lease.acquire(directory, commit.published_lease(directory.checkpoints))
        lease.keep()
        directory.write(self.config, self.prepared.what)
        return lease

    def _may_publish(self) -> bool:
        return self._lease is None or self._lease.held()

    def _event(self, event: str, /, **fields: Any) -> None:
        if self.ranks.rank == 0:
            self.directory.event(event, **fields)


def reading(prepared: Prepared, engine: Engine) -> dict[str, Any]:
    """Arguments of `Loader` with which this rank reads its part of each global batch."""
    return loader_options(prepared.config, engine, prepared.batch_sequences, prepared.context)
