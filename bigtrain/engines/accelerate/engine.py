"""The accelerate engine: models of Hugging Face transformers, by Accelerate's DDP, FSDP2 or ZeRO-2.

BF16: matmuls in BF16 under autocast, parameters, reductions, norms, logits and loss in FP32; FSDP2 gathers the
parameters in BF16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.accelerate.strategies import Plain, prepare, release
from bigtrain.engines.config import Precision
from bigtrain.engines.contract import MicroBatch, StepResult
from bigtrain.engines.guard import Guard
from bigtrain.engines.rank import COMPUTE_DTYPES, peak_memory_bytes, reseed, set_determinism, to_device
from bigtrain.models.config import ModelConfig
from bigtrain.models.families.hf import Config
from bigtrain.models.hf_tasks import examples, loss_sum
from bigtrain.models.sums import add_sums, zero_sums
from bigtrain.optim.config import OptimizerConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks, build_mesh, pick_device


class AccelerateEngine:
    """A Hugging Face model and its optimizer on this rank, and the step that all ranks take together."""

    def __init__(
        self, config: Config, strategy: Plain, *, clip: float | None, seed: int, device: torch.device, ranks: Ranks
    ) -> None:
        self.config = config
        self.strategy = strategy
        self.device = device
        self.data_parallel_rank = ranks.rank
        self.data_parallel_size = ranks.world_size
        self._clip = clip
        self._seed = seed
        self._guard = Guard(strategy.inner_optimizer)

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        vocab_size: int,
        optimizer: OptimizerConfig,
        *,
        engine: AccelerateConfig,
        layout: LayoutConfig,
        precision: Precision,
        seed: int,
        ranks: Ranks,
    ) -> AccelerateEngine:
        """Everything from the config's sections: device, process group, model with its weights, optimizer.

        Raises:
            UserError: The model cannot take the data, its file lacks weights, or Accelerate made something else than
                was asked for.
        """
        if not isinstance(model, Config):
            raise UserError(f"The engine 'accelerate' runs models of arch 'hf', not '{model.arch}'", "engine.name")
        device = pick_device(ranks.local_rank)
        set_determinism(engine, device)
        _, mesh = build_mesh(layout, ranks, device)
        built = model.build(vocab_size).to(device)
        compute_dtype = COMPUTE_DTYPES[precision]
        if compute_dtype is not torch.float32:
            _compute_in(built, device, compute_dtype)
        optimizing = optimizer.build(built.named_parameters())
        if mesh is None:
            strategy = Plain(built, optimizing)
        else:
            strategy = prepare(engine, built, optimizing, device=device, compute_dtype=compute_dtype)
        return cls(model, strategy, clip=optimizer.clip, seed=seed, device=device, ranks=ranks)

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """See `contract.Engine.train_step`."""
        numbers = self._reduce_and_scale(self.backward(step, micro_batches), vote)
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.strategy.step()
        return StepResult(numbers)

    def backward(self, step: int, micro_batches: list[MicroBatch]) -> Tensor:
        """Leave with the strategy the gradient of the sum of losses, averaged over the ranks.

        Returns:
            The sums over this rank's micro-batches, as `sums.zero_sums` has them.
        """
        reseed(self._seed, step, self.data_parallel_rank)
        self.strategy.model.train()
        sums = zero_sums(micro_batches, self.device)
        for number, arrays in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with self.strategy.accumulating(last):
                batch = to_device(arrays, self.device)
                result = loss_sum(self.strategy.model, examples(self.config, batch))
                self.strategy.backward(result.loss, last)
            add_sums(sums, result, batch)
        return sums

    def _reduce_and_scale(self, sums: Tensor, vote: float) -> Tensor:
        """One all-reduce of all that a step sums; then the gradients become those of the clipped mean, in place.

        Returns:
            What `StepResult` takes, equal on all ranks.
        """
        gradients = self.strategy.gradients()
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        # What all ranks have counts once.
        if gradients and (self.strategy.sharded or self.data_parallel_rank == 0):
            square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        vector = torch.cat([torch.stack([square, torch.full_like(square, vote)]), sums])
        self._sum(vector)
        square, votes, loss, weight = vector[:4].unbind()
        bad = ~(torch.isfinite(square) & torch.isfinite(loss))
        self._guard.arm(bad)
        scale = self.data_parallel_size / weight
        norm = square.sqrt() * scale
        if self._clip is not None:
            scale = scale * (self._clip / norm).clamp(max=1.0)
        if gradients:
            torch._foreach_mul_(gradients, scale.float())
        return torch.cat([torch.stack([loss, weight, norm, votes, bad.double(), torch.zeros_like(loss)]), vector[4:]])

    @torch.no_grad()
    def evaluate(self, batches: Iterator[list[MicroBatch]]) -> tuple[float, float]:
        """See `contract.Engine.evaluate`."""
        self.strategy.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro_batches in batches:
            for arrays in micro_batches:
                batch = to_device(arrays, self.device)
                add_sums(sums, loss_sum(self.strategy.model, examples(self.config, batch)), batch)
        self.strategy.after_evaluation()
        self._sum(sums)
        loss, weight = sums.tolist()
        return loss, weight

    def state(self) -> dict[str, Tensor]:
        """See `contract.Engine.state`."""
        return self.strategy.state()

    def state_loaded(self) -> None:
        """See `contract.Reloaded.state_loaded`: ZeRO-2 computes with copies of the FP32 weights."""
        self.strategy.state_loaded()

    def memory_bytes(self) -> int:
        """See `contract.Engine.memory_bytes`."""
        return peak_memory_bytes(self.device)

    def close(self) -> None:
        """See `contract.Engine.close`."""
        if self.data_parallel_size > 1:
            release()
            self.strategy.close()

    def _sum(self, tensor: Tensor) -> None:
        if self.data_parallel_size > 1:
            dist.all_reduce(tensor)


def _compute_in(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Run the model's forward pass under autocast: inside the model, where no wrapper can switch it off."""
    forward = model.forward

    def cast(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*arguments, **named)

    model.forward = cast
