"""One rank of a run of any size in this process: the real engine on fake tensors, in a group of fake ranks.

The engine's own `build` cuts, splits, shards and recomputes the model on the meta device, and its own `train_step`
runs forward, backward and optimizer. Only two things are not real: tensors have shapes and no values
(`FakeTensorMode`), and the process group returns at once (torch's backend "fake"). So what the code would do on that
rank is seen without its memory and without its neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import PipelineStage
from torch.testing._internal.distributed.fake_pg import FakeStore

from bigtrain.config import UserError
from bigtrain.engines.contract import MicroBatch
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.engines.fsdp.engine import FSDPEngine
from bigtrain.models.batches import batch_kind
from bigtrain.models.init import materialise
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.planning.communication import Collective, Passes
from bigtrain.planning.memory import Held
from bigtrain.planning.rehearsal.memory import TrackedMemory
from bigtrain.planning.rehearsal.recorded import RecordedCollectives

START_UP_BYTES = 8
"""Stages of a pipeline greet their neighbours with one number before the first pass of a process."""
Plant = Callable[[FSDPEngine], None]
"""Breaks an engine, to see that a rehearsal finds it."""


@dataclass(frozen=True)
class Role:
    """What a rehearsed rank is to do."""

    model: Any
    outputs: int
    """Entries of the vocabulary, or classes."""
    optimizer: Any
    engine: FSDPConfig
    layout: LayoutConfig
    precision: Any
    seed: int
    documents: bool
    world_size: int
    passes: Passes


@dataclass(frozen=True)
class Seen:
    """What one rank did in a step."""

    rank: int
    held: Held
    peak: dict[str, int]
    """Bytes by kind, at the moment that takes most."""
    collectives: list[Collective]
    blocks: list[int]
    """Of each of its stages."""
    state: dict[str, Tensor]
    """What it would save; to be read while the group lives."""
    shared: frozenset[str]
    """Parameters that the first and the last stage both hold."""


class RehearsalError(Exception):
    """What the real code raised, and in which phase."""

    def __init__(self, phase: str, cause: Exception) -> None:
        super().__init__(f"{phase}: {type(cause).__name__}: {cause}")
        self.phase, self.cause = phase, cause


@contextlib.contextmanager
def rehearsed(role: Role, rank: int, plant: Plant | None = None) -> Iterator[Seen]:
    """Build one rank and let it take a step.

    Yields:
        What it did. The fake group lives as long as the `with` block.

    Raises:
        RehearsalError: The code failed, as it would on that rank.
        UserError: Ranks that run in this process, or a model that is not built on the meta device.
    """
    if dist.is_initialized():
        raise UserError("A rank of a run cannot rehearse another", fix="Rehearse in a process of its own.")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    dist.init_process_group("fake", rank=rank, world_size=role.world_size, store=FakeStore())
    try:
        with _phase("build"):
            engine = _build(role, rank, fake)
        if engine.plain is not None:
            raise UserError(
                f"A model of arch '{role.model.arch}' builds itself on the CPU of each rank, whatever its size",
                "model.arch",
                "Rehearse a family, which is built on the meta device; `bigtrain prove` runs this one.",
            )
        if plant is not None:
            plant(engine)
        yield _steps(role, rank, engine, fake)
    finally:
        dist.destroy_process_group()


def _build(role: Role, rank: int, fake: FakeTensorMode) -> FSDPEngine:
    def on_fake_tensors(model: torch.nn.Module, device: torch.device, seed: int) -> None:
        with fake:
            materialise(model, device, seed, values=False)

    # Meta tensors become fake ones of the device where a real rank allocates them.
    with patch("bigtrain.parallel.apply.materialise", on_fake_tensors):
        engine = role.engine.build(
            role.model,
            role.outputs,
            role.optimizer,
            layout=role.layout,
            precision=role.precision,
            seed=role.seed,
            ranks=Ranks(rank, 0, role.world_size),
        )
    assert isinstance(engine, FSDPEngine)
    return engine


def _steps(role: Role, rank: int, engine: FSDPEngine, fake: FakeTensorMode) -> Seen:
    batches = _micro_batches(role)
    # The first step is the one that reads a number on the host, which has no value here.
    engine.reducer.skip_agreement()
    model, optimizer, held = engine.model, engine.optimizer, {}
    with fake, _phase("state to save"):
        saved = engine.state()
    with fake, TrackedMemory() as memory:
        held["parameters"] = memory.hold("parameters", model.parameters())
        state = (value for of_one in optimizer.state.values() for value in of_one.values())
        held["optimizer"] = memory.hold("optimizer", (one for one in state if isinstance(one, Tensor)))

        def before_update(*_: Any) -> None:
            held["gradients"] = memory.hold("gradients", (one.grad for one in model.parameters()))

        optimizer.register_step_pre_hook(before_update)
        with (
            _phase("step"),
            RecordedCollectives(role.layout.mesh(role.world_size)) as record,
            patch.object(PipelineStage, "_warmup_backward_result", _all_static, create=True),
        ):
            engine.train_step(0, batches, 1e-3)
    issued = [one for one in record if one.kind not in ("send", "recv") or one.bytes > START_UP_BYTES]
    stages = model if engine.pipeline is not None else [model]
    blocks = [len(stage.blocks()) for stage in stages]
    return Seen(rank, Held(**held), memory.peak(), issued, blocks, saved, engine.shared_by_ends)


class _Yes:
    """In place of a tensor whose value the host reads."""

    def item(self) -> int:
        return 1


def _all_static(*_: Any, **__: Any) -> _Yes:
    """What the stages agree on before their first pass, from torch 2.13 on: all know their shapes beforehand."""
    return _Yes()


def _micro_batches(role: Role) -> list[MicroBatch]:
    random = np.random.default_rng(role.seed)
    passes = role.passes
    one = batch_kind(role.model).example_batch(role.model, role.outputs, passes.sequences, random, role.documents)
    return [one] * passes.count


@contextlib.contextmanager
def _phase(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise RehearsalError(name, error) from error
