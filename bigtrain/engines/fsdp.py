"""The FSDP2 engine: plain PyTorch in one process, fully sharded over several."""

from __future__ import annotations

import hashlib
import os
import resource
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.engines.config import EngineConfig, Precision
from bigtrain.engines.contract import MicroBatch, StepResult
from bigtrain.models.config import ModelConfig
from bigtrain.optim.config import OptimizerConfig
from bigtrain.parallel.apply import build_parallel_model
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks, build_mesh, pick_device

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FSDPEngine:
    """Model and optimizer on this rank, and the step that all ranks take together."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None,
        seed: int,
        device: torch.device,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.model: Any = model
        self.optimizer = optimizer
        self.device = device
        self._clip = clip
        self._seed = seed
        self._mesh = mesh
        self._rank = dist.get_rank() if mesh is not None else 0
        self.data_parallel_rank = self._rank
        self.data_parallel_size = mesh.size() if mesh is not None else 1
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A replica's shard counts once in the norm, on the first of its copies.
        self._counts_in_norm = mesh is None or mesh["dp_replicate"].get_local_rank() == 0

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        vocab_size: int,
        optimizer: OptimizerConfig,
        *,
        engine: EngineConfig,
        layout: LayoutConfig,
        precision: Precision,
        seed: int,
        ranks: Ranks,
    ) -> FSDPEngine:
        """Everything from the config's sections: device, mesh, model with its initial weights, optimizer."""
        device = pick_device(ranks.local_rank)
        set_determinism(engine, device)
        _, mesh = build_mesh(layout, ranks, device)
        built = build_parallel_model(
            model, vocab_size, mesh=mesh, device=device, compute_dtype=COMPUTE_DTYPES[precision], seed=seed
        )
        return cls(
            built,
            optimizer.build(built.named_parameters()),
            clip=optimizer.clip,
            seed=seed,
            device=device,
            mesh=mesh,
        )

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """See `contract.Engine.train_step`."""
        sums = self.backward(step, micro_batches)
        numbers = self._reduce_and_scale(sums, vote)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(numbers)

    def backward(self, step: int, micro_batches: list[MicroBatch]) -> Tensor:
        """Leave in each parameter's `grad` the gradient of the sum of losses over all ranks, undivided.

        Returns:
            float64 (loss, weight), the sums over this rank's micro-batches.
        """
        self._reseed(step)
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for arrays in micro_batches:
            loss, weight = self.model(self._to_device(arrays))
            loss.backward()
            sums += torch.stack([loss.detach(), weight]).double()
        return sums

    def _reduce_and_scale(self, sums: Tensor, vote: float) -> Tensor:
        """One all-reduce of all that a step sums; then the gradients become those of the clipped mean, in place.

        Returns:
            float64 (loss, weight, gradient norm, votes), equal on all ranks.
        """
        gradients = [_local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        if gradients and self._counts_in_norm:
            square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        vector = torch.cat([sums, torch.stack([square, torch.full_like(square, vote)])])
        if self._mesh is not None:
            dist.all_reduce(vector)
        loss, weight, square, votes = vector.unbind()
        norm = square.sqrt() / weight
        scale = 1.0 / weight
        if self._clip is not None:
            scale = scale * (self._clip / norm).clamp(max=1.0)
        if gradients:
            torch._foreach_mul_(gradients, scale.float())
        return torch.stack([loss, weight, norm, votes])

    @torch.no_grad()
    def evaluate(self, batches: Iterator[list[MicroBatch]]) -> tuple[float, float]:
        """See `contract.Engine.evaluate`."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro_batches in batches:
            for arrays in micro_batches:
                loss, weight = self.model(self._to_device(arrays))
                sums += torch.stack([loss, weight]).double()
        if self._mesh is not None:
            # Without a backward pass FSDP keeps the root's parameters gathered: `state` wants the shards.
            self.model.reshard()
            dist.all_reduce(sums)
        loss_sum, weight_sum = sums.tolist()
        return loss_sum, weight_sum

    def state(self) -> dict[str, Tensor]:
        """See `contract.Engine.state`; an optimizer that has not stepped yet gets its state first."""
        materialise_optimizer(self.optimizer)
        return flatten(self.model, self.optimizer)

    def memory_bytes(self) -> int:
        """See `contract.Engine.memory_bytes`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        """See `contract.Engine.close`."""
        if self._mesh is not None and dist.is_initialized():
            dist.destroy_process_group()

    def _to_device(self, arrays: MicroBatch) -> dict[str, Tensor]:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.device.type == "cpu":
            return tensors
        return {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def _reseed(self, step: int) -> None:
        """Make torch's own generator a function of the step, for models that draw from it: nothing to save."""
        digest = hashlib.blake2b(f"{self._seed}/{step}/{self._rank}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def set_determinism(engine: EngineConfig, device: torch.device) -> None:
    """Choose kernels that repeat to the bit where the config asks for it."""
    wanted = device.type == "cpu" if engine.deterministic == "auto" else engine.deterministic
    if wanted and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Filling fresh memory would cost time and finds only what reads it uninitialised, which nothing here does.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
