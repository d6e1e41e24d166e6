"""The DeepSpeed engine: native models under ZeRO 0 to 3, with the same loss and clipping as under FSDP.

DeepSpeed reduces gradients, shards what its ZeRO stage shards, and calls the optimizer, which is torch's own. It
averages gradients over the data-parallel ranks. A hook on the optimizer undoes the average: just before the update it
multiplies the reduced gradients by ranks / weight, and clips them.

Under tensor parallelism the parameters are plain tensors that hold this rank's shards, as DeepSpeed takes no DTensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.checkpoint.flat import Box, FlatPart
from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.engines.clipping import scale_and_clip, square_of
from bigtrain.engines.contract import ONLY_LOSSES, Measuring, MicroBatch, StepResult, Totals
from bigtrain.engines.deepspeed.model import Plan
from bigtrain.engines.deepspeed.partitions import Partitions
from bigtrain.engines.deepspeed.start import leave_process_group
from bigtrain.engines.guard import Guard
from bigtrain.engines.rank import peak_memory_bytes, reseed, to_device
from bigtrain.engines.step import Reduced, StepReducer
from bigtrain.models.contract import LossSum
from bigtrain.models.init import fill
from bigtrain.models.sums import Sums
from bigtrain.optim.clip import ClipConfig
from bigtrain.parallel.config import Mesh


@dataclass(frozen=True)
class Started:
    """The objects that `deepspeed.build` has created for an engine."""

    deepspeed: ModuleType
    engine: Any
    """DeepSpeed's engine."""
    model: Any
    """bigtrain's module inside DeepSpeed's engine; its parameters have their qualified names."""
    optimizer: torch.optim.Optimizer
    """torch's optimizer inside DeepSpeed's engine."""
    plan: Plan
    sizes: Mesh
    """Sizes of the mesh axes over all ranks."""
    stream_is_part: bool
    """Whether the residual stream is sharded over the tp axis (sequence parallelism)."""


class DeepSpeedEngine:
    """Model and optimizer inside a DeepSpeed engine; see `contract.Engine`."""

    def __init__(self, started: Started, *, clip: ClipConfig | None, seed: int, device: torch.device) -> None:
        """Wrap the started DeepSpeed engine, and set the initial weights.

        Args:
            started: The objects from `deepspeed.build`.
            clip: The section `optimizer.clip`.
            seed: The run's seed.
            device: This rank's device.
        """
        self.engine = started.engine
        self.model = started.model
        self.optimizer = started.optimizer
        self.device = device
        rank = dist.get_rank()
        self.data_parallel_rank = started.sizes.data_parallel_rank(rank)
        self.data_parallel_size = started.sizes.data_parallel
        self._deepspeed = started.deepspeed
        self._plan = plan = started.plan
        self.reducer = StepReducer(device, rank, dist.get_world_size(), started.sizes, started.stream_is_part)
        self._clip = clip
        self._seed = seed
        self._stage = int(self.engine.zero_optimization_stage())
        self._partitions = None
        if self._stage:
            self._partitions = Partitions(
                self.engine,
                self.optimizer,
                dict(self.model.named_parameters()),
                plan.part,
                self.data_parallel_rank,
                plan.copies,
            )
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        self._total: Reduced
        self._guard = Guard(self.optimizer)
        self.optimizer.register_step_pre_hook(self._scale_gradients)
        self._fill()

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """See `contract.Engine.train_step`."""
        return self.update(self.backward(step, micro_batches), lr, vote)

    def backward(self, step: int, micro_batches: list[MicroBatch]) -> Sums:
        """Run forward and backward; DeepSpeed then holds the gradient of the sum of losses, averaged over the ranks.

        Returns:
            The sums over this rank's micro-batches.
        """
        reseed(self._seed, step)
        self.engine.train()
        sums = Sums.of(micro_batches, self.device)
        last = len(micro_batches) - 1
        with self.reducer.recorder.active():
            for index, arrays in enumerate(micro_batches):
                self.engine.set_gradient_accumulation_boundary(index == last)
                batch = to_device(arrays, self.device)
                result = LossSum(*self.engine(batch))
                self.engine.backward(result.loss, scale_wrt_gas=False)
                sums.add(result, batch)
        return sums

    def update(self, sums: Sums, lr: float, vote: float = 0.0) -> StepResult:
        """Sum over the ranks what `backward` returned, and let DeepSpeed run the optimizer's step."""
        self._reduce(sums, vote)
        self._set_lr(lr)
        self.engine.step()
        return self._result()

    def _reduce(self, sums: Sums, vote: float) -> None:
        """Reduce the step's sums in one all-reduce, without the norm if DeepSpeed computes it."""
        self._total = self.reducer.reduce(self._square_of_gradients(), vote, sums)

    def _set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def _result(self) -> StepResult:
        norm = self._mean_norm() * self.data_parallel_size / self._total.safe_weight
        return self._total.result(norm, self._bad())

    def _bad(self) -> Tensor:
        """Whether the update is to be skipped, equal on all ranks. DeepSpeed reports a bad norm as -1 or infinity."""
        norm = self._mean_norm()
        return self._total.bad(norm) | (norm < 0)

    @property
    def _norm_is_native(self) -> bool:
        """Whether bigtrain computes the norm. At ZeRO stage 0 DeepSpeed's optimizer is torch's, which computes none."""
        return self._stage == 0

    def _square_of_gradients(self) -> Tensor:
        """This rank's part of the squared norm, a float64 scalar; 0 if DeepSpeed computes the norm."""
        # The gradients are already reduced and equal on all data-parallel ranks, so only rank 0 counts them.
        if not self._norm_is_native or self.data_parallel_rank > 0:
            return torch.zeros_like(self._zero)
        copies = self._plan.copies
        return self._square([p.grad for name, p in self.model.named_parameters() if name not in copies])

    def _square(self, gradients: list[Tensor | None]) -> Tensor:
        return square_of([gradient for gradient in gradients if gradient is not None], self.device)

    def _mean_norm(self) -> Tensor:
        """Norm of DeepSpeed's gradients, which are averaged over the ranks; float64 scalar."""
        if self._norm_is_native:
            return self._total.square.sqrt()
        return torch.as_tensor(self.engine.optimizer._global_grad_norm, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def _scale_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Turn gradients of the sum of losses, averaged over ranks, into clipped gradients of loss / weight, in place.

        This is a hook before the optimizer's step. DeepSpeed steps its optimizer for one part of the parameters after
        another, each time with the gradients of that part. The global norm is known before the first one.
        """
        self._guard.arm(self._bad())
        scale = self.data_parallel_size / self._total.safe_weight
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        scale_and_clip(gradients, scale, self._mean_norm() * scale, self._clip)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[list[MicroBatch]], measuring: Measuring = ONLY_LOSSES) -> Totals:
        """See `contract.Engine.evaluate`."""
        self.engine.eval()
        sums = Sums(self.device, measuring.sources)
        with self.reducer.evaluating(measuring.wanted).active():
            for arrays in (arrays for micro_batches in batches for arrays in micro_batches):
                batch = to_device(arrays, self.device)
                sums.add(LossSum(*self.engine(batch)), batch)
                for measure in measuring.passes:
                    measure(self.engine, batch)
        return self.reducer.totals(sums)

    def state(self) -> dict[str, Tensor]:
        """See `contract.Engine.state`: FP32 weights and optimizer state, as `FlatPart`s where they are sharded."""
        if self._partitions is not None:
            self._partitions.materialise_optimizer()
            return self._partitions.state()
        materialise_optimizer(self.optimizer)
        state = flatten(self.model, self.optimizer)
        for name in self._plan.parts:
            own = [key for key, tensor in state.items() if tensor.ndim and _is_of(key, name)]
            state |= {key: self._shown(name, state[key]) for key in own}
        return state

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the optimizer uses, by qualified name, sharded as in `state`; for tests and tools.

        They exist only while the optimizer steps.
        """
        if self._partitions is not None:
            return self._partitions.gradients()
        named = self.model.named_parameters()
        return {name: self._shown(name, parameter.grad) for name, parameter in named if parameter.grad is not None}

    def _shown(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's tp shard of a parameter, its gradient or its optimizer state, as a part of the full tensor."""
        part = self._plan.parts.get(name)
        if part is None:
            return tensor.detach()
        return FlatPart(tensor.detach().view(-1), 0, part.shape, Box(part.offset, part.local_shape))

    def state_loaded(self) -> None:
        """See `contract.Reloaded.state_loaded`: forward and backward use copies of the weights in `state`."""
        if self._partitions is not None:
            self._partitions.refresh()

    def memory_bytes(self) -> int:
        """See `contract.Engine.memory_bytes`."""
        return peak_memory_bytes(self.device)

    def close(self) -> None:
        """See `contract.Engine.close`."""
        self.engine.destroy()
        leave_process_group(self._deepspeed)

    @torch.no_grad()
    def _fill(self) -> None:
        """Set the FP32 weights to the initial values that are equal at every layout.

        DeepSpeed's own FP32 weights start from values that are rounded to BF16, or from undefined ones.
        """
        if self._partitions is None:
            return
        for owned in self._partitions.owned:
            rule = self._plan.initialisers[owned.name]
            for (offset, _), piece in owned.view(owned.flat).pieces():
                fill(piece, offset, owned.part.shape, rule, self._seed, owned.name)
        self._partitions.refresh()


def _is_of(key: str, name: str) -> bool:
    """Whether an entry of the state belongs to a parameter."""
    return key == f"model.{name}" or key.startswith(f"optimizer.{name}.")
