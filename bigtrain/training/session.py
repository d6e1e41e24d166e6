"""Assembles and runs the training of one rank: engine, state, loader, callbacks and loop."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import storage, variables
from bigtrain.checkpoint.restore import store_of
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.upload import Uploader
from bigtrain.config import UserError, yaml_file
from bigtrain.config.plugin import plugin_of_launcher
from bigtrain.data.index import ShardIndex
from bigtrain.data.loader import EvaluationLoader, Loader
from bigtrain.hardware import lookup, mfu
from bigtrain.hardware.this_machine import this_machine
from bigtrain.heartbeat import Heartbeat, StopRequest
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import RECIPE, ExitCode, RunConfig, RunDirectory, lease_check, load_config
from bigtrain.run.plugins import places, plugin_hashes, plugins_of
from bigtrain.tracking.forecast import forecast_hash, read_forecast
from bigtrain.tracking.process import Trackers
from bigtrain.training.agent_link import AgentLink
from bigtrain.training.bad_steps import Policy, RollBack
from bigtrain.training.best import KeepBest
from bigtrain.training.callback import Callback, CallbackContext
from bigtrain.training.evaluation import Evaluated, Evaluation, HeldOutSet
from bigtrain.training.ledger import Ledger, process_age_s
from bigtrain.training.logs import Announcements, MetricsLog, SampleLog, Utilisation
from bigtrain.training.loop import Outcome, Trainer
from bigtrain.training.parts import reading
from bigtrain.training.prepare import Prepared, pass_context, prepare
from bigtrain.training.progress import Progress, as_plain
from bigtrain.training.restoring import Restoring
from bigtrain.training.stragglers import Stragglers

logger = logging.getLogger(__name__)

TRACKER_CLOSE_S = 20.0


def train_rank(directory: RunDirectory, heartbeat: Heartbeat, stop: StopRequest) -> ExitCode:
    """Train as one rank of the run in `directory`, from its newest verified checkpoint to its end."""
    plugin_of_launcher()
    config = load_config(directory.config)
    _check_unchanged(config, directory)
    prepared = prepare(config, verify=False, pinned=directory.recipe()["data"])
    with Session(prepared, directory, heartbeat, stop) as session:
        outcome = session.train()
    return ExitCode.FINISHED if outcome is Outcome.FINISHED else ExitCode.STOPPED


def _check_unchanged(config: RunConfig, directory: RunDirectory) -> None:
    """Refuse to continue a run whose plugins have changed since it was started."""
    recorded = directory.recipe()
    for key, sha256 in plugin_hashes(config, RECIPE).items():
        if recorded[key].get("plugin") != sha256:
            raise UserError(
                f"The plugin of '{key}' is not the one that this run was started with",
                places(plugins_of(config, key)),
                "Undo the change, or start a new run from this one with --fork NEW.",
            )


class Session:
    """The resources of one rank while it trains; leaving the context releases them."""

    def __init__(self, prepared: Prepared, directory: RunDirectory, heartbeat: Heartbeat, stop: StopRequest) -> None:
        self.prepared = prepared
        self.directory = directory
        self.config = prepared.config
        self.ranks = Ranks.from_environment()
        self.attempt = int(os.environ.get(variables.ATTEMPT, "0"))
        self._heartbeat = heartbeat
        self._identity = directory.read_record()["identity"]
        self._memory_bytes = 0
        self._trackers: Trackers | None = None
        self._ledger = Ledger()
        config = self.config
        self.engine = config.engine.build(
            config.model,
            prepared.outputs,
            config.optimizer,
            layout=config.layout,
            precision=config.precision,
            seed=config.seed,
            ranks=self.ranks,
        )
        every = config.checkpoint.every
        # Only the clock of rank 0 decides when a save is due by time.
        by_clock = every.seconds if every.is_time and self.ranks.rank == 0 else None
        self.link = AgentLink(heartbeat, stop, by_clock)
        self._restoring = Restoring(self.engine, config, directory, self._event)
        self._uploader = self._start_uploader()
        self.saver = Saver(
            directory.checkpoints,
            config.checkpoint,
            may_publish=self._may_publish(),
            on_event=self._event,
            uploader=self._uploader,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.saver.close()
            if self._uploader is not None:
                self._uploader.close()
            self.engine.close()
        if self._trackers is not None:
            self._trackers.close(TRACKER_CLOSE_S)

    def train(self) -> Outcome:
        """Restore the state, then run the training loop to its end."""
        progress = self._restoring.start()
        if progress.step and self._uploader is not None:
            self._uploader.wake()
        self._compare_memory()
        evaluation = self._evaluation()
        config, prepared = self.config, self.prepared
        log_samples = config.streaming.log_samples and self.ranks.rank == 0
        options = reading(prepared, self.engine)
        with Loader(prepared.sources, prepared.order, log_samples=log_samples, **options) as loader:
            trainer = Trainer(
                self.engine,
                loader,
                prepared.schedule,
                prepared.boundaries(),
                progress=progress,
                control=self.link,
                evaluate=Evaluated if evaluation is None else partial(self._evaluate, evaluation),
                save=self._save,
                finish=self._finish_saving,
                policy=Policy(config.bad_steps),
                on_event=self._event,
                roll_back=self._roll_back,
                callbacks=self._callbacks(),
                drawn=lambda step: loader.position(step)["drawn"],
                sources=prepared.sources.names if prepared.is_mixture else (),
            )
            return trainer.fit()

    def _roll_back(self, request: RollBack) -> Progress | None:
        """Restore the newest verified checkpoint that is old enough, and remove the checkpoints after it.

        If none is old enough, the newest one before the bad steps is restored. Returns None if there is none either.
        """
        self.saver.wait()
        self._refuse_if_fenced()
        progress = self._restoring.older(request.wanted, request.first)
        if progress is not None:
            self.saver.rewind(progress.step)
            self._event("rolled_back", step=request.step, to=progress.step, cause=request.cause)
        return progress

    def _save(self, progress: Progress) -> bool:
        config = self.config
        with self._ledger.saving(progress.step):
            self.saver.save(
                progress.step,
                self.engine.state(),
                progress={**as_plain(progress), "sources": self.prepared.fingerprints},
                config_hash=storage.hash_text(yaml_file.dump(config.plain())),
                identity=self._identity,
                mesh=vars(config.layout.mesh(self.ranks.world_size)),
                lease=int(os.environ.get(variables.LEASE, "0")),
                permanent=self.prepared.boundaries().keeps(progress.step),
            )
        self._refuse_if_fenced()
        self._compare_memory()
        return not self.saver.must_stop

    def _finish_saving(self) -> bool:
        """Wait for the last save and its upload. Returns False if the last save failed."""
        outcome = self.saver.wait()
        self._refuse_if_fenced()
        if self._uploader is not None:
            step = 0 if outcome is None else outcome.step
            if not self._uploader.finish(lambda: self._heartbeat.beat(step, "stopping")):
                logger.warning("not every checkpoint is on %s: see events.jsonl", self.config.checkpoint.storage)
        return outcome is None or outcome.status == "saved"

    def _start_uploader(self) -> Uploader | None:
        """Start uploading checkpoints to the run's store, on rank 0; None on other ranks or without a store."""
        store = store_of(self.config) if self.ranks.rank == 0 else None
        if store is None:
            return None
        config, may_publish = self.config.checkpoint, self._may_publish()
        return Uploader(self.directory, store, config, may_publish=may_publish, on_event=self._event)

    def _refuse_if_fenced(self) -> None:
        if self.saver.fenced:
            raise UserError(
                "Another launcher has taken over the run, so this one ends",
                str(self.directory.path),
                "See `bigtrain status`: only one launcher at a time may train a run.",
            )

    def _evaluation(self) -> Evaluation | None:
        """The run's evaluation; None if there is no held-out data and no evaluator has data of its own."""
        prepared, config = self.prepared, self.config.evaluation
        if not prepared.is_evaluated:
            return None
        options = reading(self.prepared, self.engine)

        def loader_of(index: ShardIndex) -> EvaluationLoader:
            return EvaluationLoader(index, batches=config.batches, sequences=config.sequences, **options)

        held_out = prepared.held_out
        sets = {
            name: HeldOutSet.of(loader_of, index, self.config.model)
            for name, index in (zip(held_out.names, held_out.indexes, strict=True) if held_out else ())
        }
        context = pass_context(self.config, self.engine, prepared.batch_sequences, prepared.train)
        return Evaluation(self.engine, config.evaluators, sets, self._warn_of_evaluation, context)

    def _warn_of_evaluation(self, line: str) -> None:
        logger.warning(line)
        self._event("warning", cause=line)

    def _warn_of_tracker(self, tracker: str, line: str) -> None:
        logger.warning(line)
        self._event("warning", tracker=tracker, cause=line)

    def _evaluate(self, evaluation: Evaluation) -> Evaluated:
        with self._ledger.measure("evaluation_s"):
            evaluated = evaluation.run()
            self._compare_memory()
        return evaluated

    def _compare_memory(self) -> None:
        """Update the peak memory to the largest of all ranks, in bytes. Collective."""
        peak = torch.tensor([self.engine.memory_bytes()], dtype=torch.int64, device=self.engine.device)
        if self.ranks.world_size > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        self._memory_bytes = int(peak)

    def _callbacks(self) -> list[Callback]:
        callbacks = self._chosen_callbacks()
        if self.config.checkpoint.best is not None:
            callbacks.append(KeepBest(self.config.checkpoint.best))
        if self.ranks.world_size > 1:
            callbacks.append(Stragglers(self._event, self.engine.device, socket.gethostname()))
        if self.ranks.rank != 0:
            return callbacks
        config, prepared = self.config, self.prepared
        callbacks += [self._ledger, Announcements(self._event, prepared.total_steps, self._how())]
        if config.streaming.log_samples:
            callbacks.append(SampleLog(self.directory))
        units = config.model.metric_units()
        shown = {**config.plain(), "metric_units": {name: unit for name, unit in units.items() if unit}}
        self._trackers = Trackers(self.directory.path, config.name, shown, config.tracking, self._warn_of_tracker)
        forecast = read_forecast(self.directory.path)
        if forecast is not None:
            self._event("forecast", hash=forecast_hash(self.directory.path), law_hash=forecast["law_hash"])
        flops = config.model.flops_per_token(prepared.outputs)
        device = lookup(this_machine(use_torch=True).device_name)

        def utilisation(flops_per_token: int) -> Utilisation:
            flops_per_step = flops_per_token * prepared.context * prepared.batch_sequences
            return lambda rate: mfu(flops_per_step, rate, device, config.precision, self.ranks.world_size)

        callbacks.append(
            MetricsLog(
                self.directory,
                every=int(config.tracking.every.value),
                mfu=utilisation(flops.full),
                mfu_causal=utilisation(flops.causal),
                memory_bytes=lambda: self._memory_bytes,
                tracker=self._trackers.put,
                epochs=prepared.epochs if prepared.is_mixture else None,
                units=units,
                forecast=forecast,
                event=self._event,
            )
        )
        return callbacks

    def _chosen_callbacks(self) -> list[Callback]:
        """The callbacks of the config, built on every rank, with the keys under which their states are saved."""
        ranks = self.ranks
        context = CallbackContext(
            self.engine, self.directory.path, self.prepared.total_steps, ranks.rank, ranks.world_size,
            self.engine.device, self.prepared,
        )  # fmt: skip
        callbacks = []
        for number, config in enumerate(self.config.callbacks):
            callback = config.build(context)
            callback.key = f"{number} {config.name}"
            callbacks.append(callback)
        return callbacks

    def _how(self) -> dict[str, Any]:
        """Fields of the event that records the start: engine, mesh, nodes, and how long this process took to start."""
        sizes = vars(self.config.layout.mesh(self.ranks.world_size))
        mesh = {axis: size for axis, size in sizes.items() if size > 1}
        age_s = process_age_s()
        start = {} if age_s is None else {"start_s": round(age_s, 3)}
        return {"nodes": self.ranks.nodes, "engine": self.config.engine.name, "mesh": mesh, **start}

    def _may_publish(self) -> Callable[[], bool]:
        """A function that tells whether the launcher still holds its lease.

        Ranks that torchrun started have no lease, and may always publish checkpoints.
        """
        number = os.environ.get(variables.LEASE)
        return lease_check(self.directory, int(number)) if number else lambda: True

    def _event(self, event: str, /, **fields: Any) -> None:
        if self.ranks.rank != 0:
            return
        if event == "saved":
            fields["times"] = self._ledger.of_save(fields["step"])
        try:
            self.directory.event(event, attempt=self.attempt, **fields)
        except OSError as error:
            # A full disk must not end the training.
            logger.warning("the event '%s' could not be recorded: %s", event, error)
