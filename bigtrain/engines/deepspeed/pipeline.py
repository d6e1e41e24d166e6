"""bigtrain's stages inside DeepSpeed's pipeline engine, which runs 1F1B (Narayanan et al. 2019) with ZeRO 0 or 1.

For DeepSpeed each stage is one layer, and stages send only the residual stream. Each stage reads the micro-batches
itself. DeepSpeed runs a step in one call, so a hook reduces the step's sums just before its optimizer instruction.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import repeat
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.schedule import OptimizerStep
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from bigtrain.engines.contract import ONLY_LOSSES, Measuring, MicroBatch, StepResult, Totals
from bigtrain.engines.deepspeed.engine import DeepSpeedEngine, Started
from bigtrain.engines.deepspeed.model import Plan
from bigtrain.engines.rank import reseed, to_device
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.sums import Sums
from bigtrain.optim.clip import ClipConfig
from bigtrain.parallel.config import Mesh
from bigtrain.parallel.pipeline import ends_group


class StageLayer(nn.Module):
    """The only layer of a DeepSpeed stage; it wraps a `contract.Staged` model."""

    def __init__(self, stage: Any, first: bool) -> None:
        super().__init__()
        self.stage = stage
        self._first = first
        self._batches: Iterator[Batch] = iter(())
        self.sums = Sums(torch.device("cpu"))

    def read(self, batches: list[Batch], sums: Sums) -> None:
        """Set the micro-batches of the next forward passes, and the sums to which their losses are added."""
        self._batches = iter(batches)
        self.sums = sums

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage on its next micro-batch.

        Args:
            x: The residual stream from the stage before; the first stage ignores it.

        Returns:
            The residual stream for the next stage; on the last stage the sum of losses, a scalar.
        """
        batch = next(self._batches)
        result = self.stage.forward_stage(None if self._first else x, batch)
        if not isinstance(result, LossSum):
            stream: Tensor = result
            return stream
        self.sums.add(result, batch)
        return result.loss


def pipeline_module(stage: nn.Module, plan: Plan, sizes: Mesh, mesh: DeviceMesh) -> PipelineModule:
    """Wrap this rank's stage in DeepSpeed's `PipelineModule`. Collective.

    DeepSpeed orders its ranks as bigtrain does: pp outermost, tp innermost.
    """
    own = mesh["pp"].get_local_rank()
    layers: list[nn.Module | None] = [None] * sizes.pp  # DeepSpeed never reads the layers of other ranks.
    layers[own] = StageLayer(stage, own == 0)
    topology = PipeModelDataParallelTopology(num_pp=sizes.pp, num_mp=sizes.tp, num_dp=sizes.data_parallel)
    with redirect_stdout(io.StringIO()):
        module = PipelineModule(layers, topology=topology, partition_method="uniform")
    if plan.shared_by_ends:
        group = ends_group(mesh["pp"], mesh)
        parameters = dict(stage.named_parameters())
        tied = [(parameters[name], group) for name in sorted(plan.shared_by_ends & parameters.keys())]
        module.get_tied_weights_and_groups = lambda: tied
    return module


class PipelinedEngine(DeepSpeedEngine):
    """A stage of the model and its optimizer inside DeepSpeed's pipeline engine; see `contract.Engine`."""

    def __init__(self, started: Started, *, clip: ClipConfig | None, seed: int, device: torch.device) -> None:
        super().__init__(started, clip=clip, seed=seed, device=device)
        (self._layer,) = (layer for layer in self.engine.module.children() if isinstance(layer, StageLayer))
        self._shape: tuple[int, ...] = ()
        self._vote = 0.0
        step = self.engine._INSTRUCTION_MAP[OptimizerStep]

        def reduce_and_step(engine: Any, **arguments: Any) -> None:
            self._reduce(self._layer.sums, self._vote)
            step(engine, **arguments)

        self.engine._INSTRUCTION_MAP = {**self.engine._INSTRUCTION_MAP, OptimizerStep: reduce_and_step}

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """See `contract.Engine.train_step`."""
        reseed(self._seed, step)
        self._set_lr(lr)
        self._vote = vote
        # Setting DeepSpeed's gradient_accumulation_steps instead would make it divide the loss by that number.
        self.engine.micro_batches = len(micro_batches)
        with self.reducer.recorder.active():
            self.engine.train_batch(self._read(micro_batches, Sums.of(micro_batches, self.device)))
        return self._result()

    @torch.no_grad()
    def evaluate(self, batches: Iterator[list[MicroBatch]], measuring: Measuring = ONLY_LOSSES) -> Totals:
        """See `contract.Engine.evaluate`."""
        sums = Sums(self.device)
        with self.reducer.evaluating(measuring.wanted).active():
            for micro_batches in batches:
                nothing, count = self._read(micro_batches, sums), len(micro_batches)
                self.engine.eval_batch(nothing, reduce_output=None, bcast_loss=False, num_micro_batches=count)
        return self.reducer.totals(sums)

    def _read(self, micro_batches: list[MicroBatch], sums: Sums) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the stage its micro-batches; the stage adds their losses to `sums`.

        Returns:
            An endless iterator of dummy tensors, which DeepSpeed takes for inputs and labels.
        """
        tensors = [to_device(arrays, self.device) for arrays in micro_batches]
        self._layer.read(tensors, sums)
        shape = tuple(next(iter(tensors[0].values())).shape)
        if shape != self._shape:
            # DeepSpeed's stages exchange the shape of the stream only with the first message after this reset.
            self.engine.reset_activation_shape()
            self._shape = shape
        return repeat((self._zero, self._zero))

    @property
    def _norm_is_native(self) -> bool:
        return not self.engine.using_bf16_optimizer

    def _square_of_gradients(self) -> Tensor:
        zero = self.engine.optimizer
        if self._stage == 0 or not self._norm_is_native:
            return super()._square_of_gradients()
        copies = {id(p) for name, p in self.model.named_parameters() if name in self._plan.copies}
        counted: list[Tensor | None] = []
        for index, gradients in zero.averaged_gradients.items():
            held = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
            owners = zero.params_in_partition[index]
            counted += [gradient for gradient, owner in zip(held, owners, strict=True) if id(owner) not in copies]
        return self._square(counted)
