"""Runs one rank of a run of any world size in this process: the real engine on fake tensors in a fake process group.

The engine's own `build` applies pp, tp, FSDP and recompute to the model on the meta device, and its own `train_step`
runs forward, backward and optimizer. Only two things are not real: tensors have shapes but no values
(`FakeTensorMode`), and collectives return at once (torch's backend "fake"). This shows what the code does on that rank
without its memory and without the other ranks.
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
"""Size of the message that pipeline stages exchange before the first pass of a process, which is not counted."""
Plant = Callable[[FSDPEngine], None]
"""A function that breaks an engine, to test that a rehearsal finds the fault."""


@dataclass(frozen=True)
class Role:
    """The settings of a rehearsed rank."""

    model: Any
    outputs: int
    """Number of vocabulary entries, or of classes."""
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
    """The observations of one rank in a step."""

    rank: int
    held: Held
    peak: dict[str, int]
    """Peak memory in bytes, by kind."""
    collectives: list[Collective]
    blocks: list[int]
    """Number of blocks of each of the rank's stages."""
    state: dict[str, Tensor]
    """The state that the rank would save; it must be read before the process group is destroyed."""
    shared: frozenset[str]
    """Names of parameters that the first and the last stage both hold."""


class RehearsalError(Exception):
    """The real code raised an exception, which is `cause`, in the phase `phase`."""

    def __init__(self, phase: str, cause: Exception) -> None:
        super().__init__(f"{phase}: {type(cause).__name__}: {cause}")
        self.phase, self.cause = phase, cause


@contextlib.contextmanager
def rehearsed(role: Role, rank: int, plant: Plant | None = None) -> Iterator[Seen]:
    """Build one rank, and run one step on it.

    Yields:
        The observations. The fake process group exists until the end of the `with` block.

    Raises:
        RehearsalError: The code raised an exception, as it would on that rank.
        UserError: This process has a process group already, or the model is not built on the meta device.
    """
    if dist.is_initialized():
        raise UserError("A rank of a run cannot rehearse another run", fix="Rehearse in a separate process.")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    dist.init_process_group("fake", rank=rank, world_size=role.world_size, store=FakeStore())
    try:
        with _phase("build"):
            engine = _build(role, rank, fake)
        if engine.plain is not None:
            raise UserError(
                f"A model of arch '{role.model.arch}' is always built on the CPU of each rank",
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

    # Where a real rank would allocate meta tensors on its device, they become fake tensors of the device.
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
    # The first step would read a value on the host, but fake tensors have none.
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
    """A stand-in for a tensor whose value the host reads."""

    def item(self) -> int:
        return 1


def _all_static(*_: Any, **__: Any) -> _Yes:
    """Replaces an exchange between stages before their first pass, in torch 2.13 and later: all shapes are static."""
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
