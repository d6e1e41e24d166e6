"""One rank from its config to its end: engine, state, loader, callbacks and loop put together."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import storage, variables
from bigtrain.checkpoint.huggingface import load_hf, verify_hf
from bigtrain.checkpoint.loader import Found, find, load_found, saved_names
from bigtrain.checkpoint.ranks import Ranks as Together
from bigtrain.checkpoint.ranks import world_group
from bigtrain.checkpoint.restore import refuse_unrestored, store_of
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.upload import Uploader
from bigtrain.config import UserError, yaml_file
from bigtrain.config.plugin import plugin_of_launcher
from bigtrain.data.loader import EvaluationLoader, Loader
from bigtrain.engines.contract import Reloaded
from bigtrain.hardware import lookup, mfu
from bigtrain.hardware.this_machine import this_machine
from bigtrain.heartbeat import Control, Heartbeat, Phase, StopRequest
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import RECIPE, ExitCode, RunConfig, RunDirectory, lease_check, load_config
from bigtrain.run.plugins import plugin_hashes
from bigtrain.tracking.wandb import WandbTracker, start_tracker
from bigtrain.training.bad_steps import Policy, RollBack
from bigtrain.training.callbacks import Announcements, MetricsLog, SampleLog, Utilisation
from bigtrain.training.ledger import Ledger, process_age_s
from bigtrain.training.loop import (
    VOTE_SAVE,
    VOTE_STOP,
    Callback,
    Outcome,
    Progress,
    Trainer,
    as_plain,
    from_plain,
)
from bigtrain.training.prepare import Prepared, prepare
from bigtrain.training.source import HfSource, is_fresh, resolve_source
from bigtrain.training.stragglers import Stragglers

logger = logging.getLogger(__name__)

TRACKER_CLOSE_S = 20.0


def train_rank(directory: RunDirectory, heartbeat: Heartbeat, stop: StopRequest) -> ExitCode:
    """Train as one rank of the run in `directory`, from its newest sound checkpoint to its end."""
    plugin_of_launcher()
    config = load_config(directory.config)
    _check_unchanged(config, directory)
    prepared = prepare(config, verify=False, pinned=directory.recipe()["data"])
    with Session(prepared, directory, heartbeat, stop) as session:
        outcome = session.train()
    return ExitCode.FINISHED if outcome is Outcome.FINISHED else ExitCode.STOPPED


def _check_unchanged(config: RunConfig, directory: RunDirectory) -> None:
    """A rank that is started again must run the code that the run was started with."""
    recorded = directory.recipe()
    for key, sha256 in plugin_hashes(config, RECIPE).items():
        if recorded[key].get("plugin") != sha256:
            raise UserError(
                f"The plugin of '{key}' is not the one that this run was started with",
                getattr(config, key).plugin.place,
                "Undo the change, or start a new run from this one with --fork NEW.",
            )


class AgentLink:
    """The loop's line to its agent: heartbeats up, requests to stop or save down."""

    def __init__(self, heartbeat: Heartbeat, stop: StopRequest, save_every_s: float | None) -> None:
        self._heartbeat = heartbeat
        self._stop = stop
        self._save_every_s = save_every_s
        self._next_save = time.monotonic() + save_every_s if save_every_s else None
        self._answered = Control.RUN

    def beat(self, step: int, phase: Phase) -> None:
        """Pass a sign of life on."""
        self._heartbeat.beat(step, phase)

    def vote(self) -> float:
        """What this rank asks of all: a save that was asked for, or is due by the clock, is voted for once."""
        control = self._heartbeat.control()
        saves = control is Control.SAVE and self._answered is not Control.SAVE
        self._answered = control
        if self._next_save is not None and time.monotonic() >= self._next_save:
            saves = True
            self._next_save = time.monotonic() + (self._save_every_s or 0.0)
        stops = control is Control.STOP or self._stop.requested
        return VOTE_STOP * stops + VOTE_SAVE * saves


class Session:
    """What one rank holds while it trains; leaving it gives everything back."""

    def __init__(self, prepared: Prepared, directory: RunDirectory, heartbeat: Heartbeat, stop: StopRequest) -> None:
        self.prepared = prepared
        self.directory = directory
        self.config = prepared.config
        self.ranks = Ranks.from_environment()
        self.attempt = int(os.environ.get(variables.ATTEMPT, "0"))
        self._heartbeat = heartbeat
        self._identity = directory.read_record()["identity"]
        self._memory_bytes = 0
        self._tracker: WandbTracker | None = None
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
        # The clock of one rank decides for all.
        by_clock = every.seconds if every.is_time and self.ranks.rank == 0 else None
        self.link = AgentLink(heartbeat, stop, by_clock)
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
        if self._tracker is not None:
            self._tracker.close(TRACKER_CLOSE_S)

    def train(self) -> Outcome:
        """Restore, then run the loop."""
        progress = self._restore()
        self._compare_memory()
        config, prepared = self.config, self.prepared
        log_samples = config.streaming.log_samples and self.ranks.rank == 0
        with Loader(prepared.sources, prepared.order, log_samples=log_samples, **self._reading()) as loader:
            trainer = Trainer(
                self.engine,
                loader,
                prepared.schedule,
                prepared.boundaries(),
                progress=progress,
                control=self.link,
                evaluate=self._evaluate,
                save=self._save,
                finish=self._finish_saving,
                policy=Policy(config.bad_steps),
                roll_back=self._roll_back,
                callbacks=self._callbacks(),
                drawn=lambda step: loader.position(step)["drawn"],
                sources=prepared.sources.names if prepared.is_mixture else (),
            )
            return trainer.fit()

    def _restore(self) -> Progress:
        """Load the newest sound checkpoint, else what `init` names, else start from the seed."""
        found = find(self.directory.checkpoints)
        if found is not None:
            for warning in found.warnings:
                self._event("fallback", step=found.step, cause=warning)
            self._load(found, self.engine.state())
            if self._uploader is not None:
                self._uploader.wake()
            return from_plain(found.manifest.progress)
        Together(world_group()).once(lambda: refuse_unrestored(self.config))
        init = self.config.init
        if init.source is None:
            return Progress()
        source = resolve_source(init.source, self.directory.path.parent)
        if isinstance(source, HfSource):
            return self._take_weights(source)
        if init.hash not in (None, source.hash):
            raise UserError(
                "init.source is not the checkpoint that this run began with",
                f"{source.run}@{source.step}",
                "Restore it, or choose another --name.",
            )
        found = find(source.checkpoints, source.step)
        assert found is not None  # find raises where the step is not there
        return self._take(found)

    def _roll_back(self, asked: RollBack) -> Progress | None:
        """Bring back the newest sound checkpoint that is old enough, or any before, and remove those after it."""
        self.saver.wait()
        self._refuse_if_fenced()
        checkpoints = self.directory.checkpoints
        found = find(checkpoints, before=asked.wanted) or find(checkpoints, before=asked.first - 1)
        if found is None:
            return None
        self._load(found, self.engine.state())
        self.saver.rewind(found.step)
        progress = from_plain(found.manifest.progress)
        self._event("rolled_back", step=asked.step, to=found.step, cause=asked.cause)
        return progress

    def _take(self, found: Found) -> Progress:
        """Take the part of another run's checkpoint that `init.state` names."""
        state = self.engine.state()
        if self.config.init.state == "weights":
            weights = {f"model.{name}": tensor for name, tensor in self._wanted(state).items()}
            fresh = [f"model.{pattern}" for pattern in self.config.init.fresh]
            self._load(found, weights, prefix="model.", leave=fresh)
            return Progress()
        # The other run may have been in another precision.
        saved = saved_names(found)
        state = {name: state[name] for name in state if name in saved or not name.startswith("loss_scale.")}
        self._load(found, state, leave=["loss_scale.*"])
        return from_plain(found.manifest.progress) if self.config.init.state == "all" else Progress()

    def _take_weights(self, source: HfSource) -> Progress:
        """Take Hugging Face weights, compared with the hash that the launcher found."""
        init = self.config.init
        if init.hash is not None:
            verify_hf(source.files, init.hash)
        weights = self._wanted(self.engine.state())
        names = source.files.check_fit(self.config.model, {name: tuple(weights[name].shape) for name in weights})
        load_hf(source.files, names, weights)
        if isinstance(self.engine, Reloaded):
            self.engine.state_loaded()
        return Progress()

    def _wanted(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights that a source gives, by qualified names."""
        weights = {name.removeprefix("model."): state[name] for name in state if name.startswith("model.")}
        return {name: tensor for name, tensor in weights.items() if not is_fresh(name, self.config.init)}

    def _load(self, found: Found, state: dict[str, torch.Tensor], prefix: str = "", leave: Sequence[str] = ()) -> None:
        load_found(found, state, prefix=prefix, leave=leave)
        if isinstance(self.engine, Reloaded):
            self.engine.state_loaded()

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
        """Wait for the last save and its upload; whether the end of the run is safe on the disk."""
        outcome = self.saver.wait()
        self._refuse_if_fenced()
        if self._uploader is not None:
            step = 0 if outcome is None else outcome.step
            if not self._uploader.finish(lambda: self._heartbeat.beat(step, "stopping")):
                logger.warning("not every checkpoint is on %s: see events.jsonl", self.config.checkpoint.storage)
        return outcome is None or outcome.status == "saved"

    def _start_uploader(self) -> Uploader | None:
        """Where checkpoints go to a store, on the rank that acts for all."""
        store = store_of(self.config) if self.ranks.rank == 0 else None
        if store is None:
            return None
        config, may_publish = self.config.checkpoint, self._may_publish()
        return Uploader(self.directory, store, config, may_publish=may_publish, on_event=self._event)

    def _refuse_if_fenced(self) -> None:
        if self.saver.fenced:
            raise UserError(
                "Another launcher has taken the run over; this one ends",
                str(self.directory.path),
                "See `bigtrain status`; one launcher at a time may train a run.",
            )

    def _evaluate(self) -> dict[str, float]:
        with self._ledger.measure("evaluation_s"):
            return self._evaluated()

    def _evaluated(self) -> dict[str, float]:
        held_out = self.prepared.held_out
        assert held_out is not None  # there are no evaluations without validation data
        evaluation = self.config.evaluation
        losses, weights, text_bytes = 0.0, 0.0, 0.0
        metrics: dict[str, float] = {}
        for name, index in zip(held_out.names, held_out.indexes, strict=True):
            with EvaluationLoader(
                index, batches=evaluation.batches, sequences=evaluation.sequences, **self._reading()
            ) as loader:
                loss, weight = self.engine.evaluate(batch.micro_batches for batch in loader)
            losses, weights = losses + loss, weights + weight
            text_bytes += weight * (index.bytes_per_token or math.nan)
            if len(held_out.names) > 1:
                metrics[f"val_loss/{name}"] = loss / weight
        self._compare_memory()
        metrics["val_loss"] = losses / weights
        if text_bytes > 0:
            # Nats over the bytes of the text, in bits.
            metrics["val_bits_per_byte"] = losses / text_bytes / math.log(2)
        return metrics

    def _reading(self) -> dict[str, Any]:
        """How this rank reads its part of a global batch."""
        config = self.config
        return {
            "batch_size": self.prepared.batch_sequences,
            "context": self.prepared.context,
            "dp_rank": self.engine.data_parallel_rank,
            "dp_size": self.engine.data_parallel_size,
            "micro_size": config.layout.micro_size,
            "least_micro_batches": config.layout.least_micro_batches,
            "micro_batch_multiple": config.layout.micro_batch_multiple,
            "seed": config.seed,
            "document_mask": config.data.document_mask,
            "prefetch": config.streaming.prefetch,
            "streaming": config.streaming,
        }

    def _compare_memory(self) -> None:
        """Let all ranks know the peak of the worst."""
        peak = torch.tensor([self.engine.memory_bytes()], dtype=torch.int64, device=self.engine.device)
        if self.ranks.world_size > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        self._memory_bytes = int(peak)

    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = []
        if self.ranks.world_size > 1:
            callbacks.append(Stragglers(self._event, self.engine.device, socket.gethostname()))
        if self.ranks.rank != 0:
            return callbacks
        config, prepared = self.config, self.prepared
        callbacks += [self._ledger, Announcements(self._event, prepared.total_steps, self._how())]
        if config.streaming.log_samples:
            callbacks.append(SampleLog(self.directory))
        self._tracker = start_tracker(self.directory.path, config.name, config.plain(), config.tracking)
        flops = config.model.flops_per_token(prepared.outputs)
        device = lookup(this_machine(use_torch=True).device_name)

        def utilisation(flops_per_token: int) -> Utilisation:
            return lambda rate: mfu(flops_per_token, rate, device, config.precision, self.ranks.world_size)

        callbacks.append(
            MetricsLog(
                self.directory,
                every=int(config.tracking.every.value),
                mfu=utilisation(flops.full),
                mfu_causal=utilisation(flops.causal),
                memory_bytes=lambda: self._memory_bytes,
                tracker=self._tracker.put if self._tracker else None,
                epochs=prepared.epochs if prepared.is_mixture else None,
            )
        )
        return callbacks

    def _how(self) -> dict[str, Any]:
        """Engine, mesh and nodes, and how long the start of this process took, for the record."""
        sizes = vars(self.config.layout.mesh(self.ranks.world_size))
        mesh = {axis: size for axis, size in sizes.items() if size > 1}
        age_s = process_age_s()
        start = {} if age_s is None else {"start_s": round(age_s, 3)}
        return {"nodes": self.ranks.nodes, "engine": self.config.engine.name, "mesh": mesh, **start}

    def _may_publish(self) -> Callable[[], bool]:
        """Whether the lease that the launcher took is still held; a gang that torchrun started has none."""
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
