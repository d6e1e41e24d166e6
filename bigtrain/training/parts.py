"""The parts of a training run for a loop of one's own: engine, loader, schedule, saves.

    with TrainingParts(config, run_directory) as parts:
        for batch in parts.batches():
            result = parts.engine.train_step(batch.step, batch.micro_batches, parts.lr(batch.step))
            parts.finish_step(result)
            if parts.step % 100 == 0:
                parts.save()

It computes what `bigtrain train` computes, to the bit. What the trainer adds is not in it: metrics, evaluations,
callbacks, bad steps, restarts.
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
    """What a loop needs on this rank. As a context manager it waits for the last save and gives all back.

    One process trains alone; under torchrun each process is a rank.

    Args:
        config: Of the run.
        directory: Where it saves itself. A run that is there is resumed.

    Raises:
        UserError: Anything wrong with config or data; another process trains this run, or it trains something else.
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
        """Steps done."""
        return self.progress.step

    @property
    def total_steps(self) -> int:
        """Steps of the run's `duration`."""
        return self.prepared.total_steps

    def lr(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        return self.prepared.schedule.lr(step)

    def batches(self) -> Iterator[StepBatch]:
        """This rank's batches of the steps that are left."""
        return self.loader.batches(self.step, self.total_steps)

    def finish_step(self, result: StepResult) -> StepNumbers:
        """Wait for a step, and count it: `loss / weight` of what this returns is its mean loss."""
        numbers = result.read()
        self.progress.step += 1
        self.progress.tokens += numbers.weight
        self.progress.drawn = self.loader.position(self.progress.step)["drawn"]
        return numbers

    def save(self) -> None:
        """Save weights, optimizer and position, in the background if the config says so. Collective.

        `bigtrain train` and `bigtrain resume` go on from it.
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
    """How a rank reads its part of a global batch: arguments of `Loader`."""
    return loader_options(prepared.config, engine, prepared.batch_sequences, prepared.context)
