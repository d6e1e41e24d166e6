"""The accelerate engine: models of Hugging Face transformers under Accelerate's DDP, FSDP2 or ZeRO-2.

With BF16, matmuls run in BF16 under autocast; parameters, reductions, norms, logits and loss are FP32. FSDP2 gathers
the parameters in BF16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.accelerate.strategies import Plain, prepare, release
from bigtrain.engines.clipping import scale_and_clip, square_of
from bigtrain.engines.config import EngineParts
from bigtrain.engines.contract import ONLY_LOSSES, Measuring, MicroBatch, StepResult, Totals
from bigtrain.engines.guard import Guard
from bigtrain.engines.rank import COMPUTE_DTYPES, peak_memory_bytes, reseed, set_determinism, to_device
from bigtrain.engines.step import StepReducer
from bigtrain.models.families.hf import Config
from bigtrain.models.hf_tasks import RouterLoss, examples, loss_sum
from bigtrain.models.plain.across import AllRanks, BatchRanks, OneProcess, across
from bigtrain.models.plain.network import without_fillers
from bigtrain.models.sums import Sums
from bigtrain.optim.build import is_frozen
from bigtrain.optim.clip import ClipConfig
from bigtrain.parallel.mesh import Ranks, build_mesh, pick_device


class AccelerateEngine:
    """Trains a Hugging Face model; each rank holds its part of the model and the optimizer. See `contract.Engine`."""

    def __init__(
        self, config: Config, strategy: Plain, *, clip: ClipConfig | None, seed: int, device: torch.device, ranks: Ranks
    ) -> None:
        self.config = config
        self.strategy = strategy
        self.device = device
        self.data_parallel_rank = ranks.rank
        self.data_parallel_size = ranks.world_size
        self.reducer = StepReducer(device, ranks.rank, ranks.world_size)
        self._clip = clip
        self._seed = seed
        self._guard = Guard(strategy.inner_optimizer)
        self._router = RouterLoss.of(config.shape)

    @classmethod
    def build(cls, engine: AccelerateConfig, parts: EngineParts) -> AccelerateEngine:
        """Build device, process group, model with its weights, and optimizer from the config's sections. Collective.

        Raises:
            UserError: The model does not fit the data, its file lacks weights, or Accelerate did not build what the
                config requests.
        """
        model, optimizer, ranks = parts.model, parts.optimizer, parts.ranks
        if not isinstance(model, Config):
            raise UserError(f"The engine 'accelerate' runs models of arch 'hf', not '{model.arch}'", "engine.name")
        device = pick_device(ranks.local_rank)
        set_determinism(engine, device)
        _, mesh = build_mesh(parts.layout, ranks, device)
        built = model.build_for_engine(parts.vocab_size, parts.seed).to(device)
        for name, parameter in built.named_parameters():
            if is_frozen(optimizer, name):
                parameter.requires_grad_(False)
        compute_dtype = COMPUTE_DTYPES[parts.precision]
        if compute_dtype is not torch.float32:
            _compute_in(built, device, compute_dtype)
        optimizing = optimizer.build(built.named_parameters())
        if mesh is None:
            strategy = Plain(built, optimizing)
        else:
            strategy = prepare(engine, built, optimizing, device=device, compute_dtype=compute_dtype)
        return cls(model, strategy, clip=optimizer.clip, seed=parts.seed, device=device, ranks=ranks)

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """See `contract.Engine.train_step`."""
        result = self._reduce_and_scale(self.backward(step, micro_batches), vote)
        for group in self.strategy.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.strategy.step()
        return result

    def backward(self, step: int, micro_batches: list[MicroBatch]) -> Sums:
        """Run forward and backward; the strategy then holds the gradient of the sum of losses, averaged over the ranks.

        Returns:
            The sums over this rank's micro-batches.
        """
        reseed(self._seed, step)
        self.strategy.model.train()
        sums = Sums.of(micro_batches, self.device)
        for number, arrays in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with self.strategy.accumulating(last), self.reducer.recorder.active():
                batch = to_device(arrays, self.device)
                with self._counting_over_ranks(arrays, len(micro_batches)):
                    result = loss_sum(self.strategy.model, examples(self.config, batch), self._router)
                    self.strategy.backward(result.loss, last)
            sums.add(result, batch)
        return sums

    def _counting_over_ranks(self, arrays: MicroBatch, passes: int) -> AbstractContextManager[None]:
        """A context in which the router's auxiliary loss is computed over the global batch."""
        if self._router is None:
            return nullcontext()
        _, rows = without_fillers(arrays)
        many = self.data_parallel_size > 1
        ranks: BatchRanks = AllRanks(rows, self.device) if many else OneProcess(rows)
        return across(ranks, len(arrays["keys"]), passes)

    def _reduce_and_scale(self, sums: Sums, vote: float) -> StepResult:
        """Reduce the step's sums in one all-reduce, then turn the gradients into the clipped ones of the mean loss.

        The gradients change in place.
        """
        gradients = self.strategy.gradients()
        # Only rank 0 counts gradients that all ranks hold.
        counted = gradients if self.strategy.sharded or self.data_parallel_rank == 0 else []
        total = self.reducer.reduce(square_of(counted, self.device), vote, sums)
        bad = total.bad(total.square)
        self._guard.arm(bad)
        scale = self.data_parallel_size / total.safe_weight
        norm = total.square.sqrt() * scale
        scale_and_clip(gradients, scale, norm, self._clip)
        return total.result(norm, bad)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[list[MicroBatch]], measuring: Measuring = ONLY_LOSSES) -> Totals:
        """See `contract.Engine.evaluate`."""
        self.strategy.model.eval()
        sums = Sums(self.device, measuring.sources)
        with self.reducer.evaluating(measuring.wanted).active():
            for arrays in (arrays for micro_batches in batches for arrays in micro_batches):
                batch = to_device(arrays, self.device)
                sums.add(loss_sum(self.strategy.model, examples(self.config, batch)), batch)
                for measure in measuring.passes:
                    measure(self.strategy.model, batch)
        self.strategy.after_evaluation()
        return self.reducer.totals(sums)

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


def _compute_in(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Run the model's forward pass under autocast. The context is inside the model, where no wrapper can disable it."""
    forward = model.forward

    def cast(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*arguments, **named)

    model.forward = cast
