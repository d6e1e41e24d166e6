"""The DeepSpeed engine: our models under ZeRO 0 to 3, by the same laws as under FSDP.

DeepSpeed reduces gradients, spreads what its stage spreads, and calls the optimizer, which is torch's own. It averages
gradients over the ranks; that, and nothing else, is undone: a hook on the optimizer multiplies the reduced gradients by
ranks / weight and clips them, just before they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.config import UserError
from bigtrain.engines.config import DeepSpeedConfig, Precision
from bigtrain.engines.contract import MicroBatch, StepResult
from bigtrain.engines.deepspeed_config import check_passthrough, deepspeed_config, low_precision_weights
from bigtrain.engines.deepspeed_partitions import Partitions
from bigtrain.engines.deepspeed_start import import_deepspeed, join_process_group, leave_process_group
from bigtrain.engines.rank import COMPUTE_DTYPES, peak_memory_bytes, reseed, set_determinism, to_device
from bigtrain.models.config import ModelConfig
from bigtrain.models.contract import Model
from bigtrain.models.init import fill, initialise
from bigtrain.optim.config import OptimizerConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks, pick_device
from bigtrain.parallel.recompute import recompute_blocks


class DeepSpeedEngine:
    """Model and optimizer inside a DeepSpeed engine; see `contract.Engine`."""

    def __init__(
        self,
        deepspeed: Any,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        *,
        shapes: dict[str, torch.Size],
        clip: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        """Take over what `build` has started.

        Args:
            deepspeed: The imported package.
            engine: DeepSpeed's engine.
            optimizer: torch's optimizer inside it.
            shapes: Of the whole parameters, by name.
            clip: Largest norm of the gradient; None: no limit.
            seed: The run's.
            device: The rank's.
        """
        self.engine = engine
        self.model: Any = engine.module
        self.optimizer = optimizer
        self.device = device
        self.data_parallel_rank = dist.get_rank()
        self.data_parallel_size = dist.get_world_size()
        self._deepspeed = deepspeed
        self._clip = clip
        self._seed = seed
        self._stage = int(engine.zero_optimization_stage())
        self._partitions = Partitions(engine, optimizer, shapes) if self._stage else None
        self._weight = torch.ones((), dtype=torch.float64, device=device)
        self._norm = torch.zeros_like(self._weight)
        optimizer.register_step_pre_hook(self._scale_gradients)

    @classmethod
    def build(
        cls,
        model: ModelConfig,
        vocab_size: int,
        optimizer: OptimizerConfig,
        *,
        engine: DeepSpeedConfig,
        layout: LayoutConfig,
        precision: Precision,
        seed: int,
        ranks: Ranks,
    ) -> DeepSpeedEngine:
        """Everything from the config's sections, as `FSDPEngine.build`.

        Raises:
            UserError: A layout that is not plain data parallelism, or a passthrough that DeepSpeed does not take.
        """
        _check_layout(layout, ranks)
        device = pick_device(ranks.local_rank)
        set_determinism(engine, device)
        deepspeed = import_deepspeed(device)
        join_process_group(deepspeed, ranks, device)
        config = deepspeed_config(engine, precision, device)
        check_passthrough(config, engine.passthrough)
        # Shapes and rules of the whole parameters: under ZeRO 3 those of the built model are parts without a shape.
        with torch.device("meta"):
            plan = cast(Any, model.build(vocab_size))
        if engine.zero == 3:
            # Its `dtype` is left alone: given FP32, it takes BF16.
            with deepspeed.zero.Init(config_dict_or_path=config):
                built = cast(Any, model.build(vocab_size))
        else:
            with torch.device("meta"):
                built = cast(Any, model.build(vocab_size))
            built.to_empty(device=device)
            initialise(built, seed)
        built.compute_dtype = COMPUTE_DTYPES[precision]
        recompute_blocks([block for _, block in built.blocks()], engine.recompute)
        if engine.zero == 3:
            _hold_with_root(deepspeed, built)
        inner = optimizer.build(plan.named_parameters())
        _exchange_parameters(inner, dict(built.named_parameters()))
        started, *_ = deepspeed.initialize(model=built, optimizer=inner, config=config)
        _check_got(started, engine, precision)
        shapes = {name: parameter.shape for name, parameter in plan.named_parameters()}
        self = cls(deepspeed, started, inner, shapes=shapes, clip=optimizer.clip, seed=seed, device=device)
        self._fill(plan, seed)
        return self

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """See `contract.Engine.train_step`."""
        return self.update(self.backward(step, micro_batches), lr, vote)

    def backward(self, step: int, micro_batches: list[MicroBatch]) -> Tensor:
        """Leave with DeepSpeed the gradient of the sum of losses, averaged over the ranks.

        Returns:
            float64 (loss, weight), the sums over this rank's micro-batches.
        """
        reseed(self._seed, step, self.data_parallel_rank)
        self.engine.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        last = len(micro_batches) - 1
        for index, arrays in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == last)
            loss, weight = self.engine(to_device(arrays, self.device))
            self.engine.backward(loss, scale_wrt_gas=False)
            sums += torch.stack([loss.detach(), weight]).double()
        return sums

    def update(self, sums: Tensor, lr: float, vote: float = 0.0) -> StepResult:
        """Sum what `backward` returned over the ranks, and let DeepSpeed take the step."""
        vector = torch.cat([sums, torch.full_like(sums[:1], vote)])
        dist.all_reduce(vector)
        loss, self._weight, votes = vector.unbind()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._stage == 0:
            # Reduced already, and stepped all at once.
            self._norm = _norm(self.model.parameters())
        self.engine.step()
        norm = self._mean_norm() * self.data_parallel_size / self._weight
        return StepResult(torch.stack([loss, self._weight, norm, votes]))

    def _mean_norm(self) -> Tensor:
        """Norm of the gradients as DeepSpeed has them, averaged over the ranks; float64."""
        if self._stage == 0:
            return self._norm
        return torch.as_tensor(self.engine.optimizer._global_grad_norm, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def _scale_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """From the mean over ranks of the sum of losses to the clipped gradient of loss / weight, in place.

        DeepSpeed steps its optimizer part by part, each time with the part's gradients; the norm is known before.
        """
        scale = self.data_parallel_size / self._weight
        if self._clip is not None:
            scale = scale * (self._clip / (self._mean_norm() * scale)).clamp(max=1.0)
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if gradients:
            torch._foreach_mul_(gradients, scale.to(gradients[0].device, torch.float32))

    @torch.no_grad()
    def evaluate(self, batches: Iterator[list[MicroBatch]]) -> tuple[float, float]:
        """See `contract.Engine.evaluate`."""
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for micro_batches in batches:
            for arrays in micro_batches:
                loss, weight = self.engine(to_device(arrays, self.device))
                sums += torch.stack([loss, weight]).double()
        dist.all_reduce(sums)
        loss_sum, weight_sum = sums.tolist()
        return loss_sum, weight_sum

    def state(self) -> dict[str, Tensor]:
        """See `contract.Engine.state`: FP32 weights, as `FlatPart`s where ranks share them."""
        if self._partitions is None:
            materialise_optimizer(self.optimizer)
            return flatten(self.model, self.optimizer)
        self._partitions.materialise_optimizer()
        return self._partitions.state()

    def state_loaded(self) -> None:
        """See `contract.Reloaded.state_loaded`: the weights that compute are copies of those in `state`."""
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
    def _fill(self, plan: Model, seed: int) -> None:
        """The initial FP32 weights that every layout has; DeepSpeed's own start from rounded or other ones."""
        if self._partitions is None:
            return
        rules = plan.initialisers()
        for owned in self._partitions.owned:
            for (offset, _), piece in owned.view(owned.flat).pieces():
                fill(piece, offset, tuple(owned.shape), rules[owned.name], seed, owned.name)
        self._partitions.refresh()


def _check_layout(layout: LayoutConfig, ranks: Ranks) -> None:
    try:
        sizes = layout.mesh(ranks.world_size)
    except ValueError as error:
        raise UserError(str(error), "layout") from None
    if sizes.dp_shard != ranks.world_size:
        raise UserError(
            f"engine deepspeed spreads the model over all {ranks.world_size} ranks",
            "layout",
            "Leave dp_replicate, cp, pp and tp at 1 and dp_shard at -1, or use engine.name: fsdp.",
        )


def _check_got(started: Any, engine: DeepSpeedConfig, precision: Precision) -> None:
    """Nothing may be replaced without a word: DeepSpeed must run the stage and the weights that were asked for."""
    dtype = torch.bfloat16 if low_precision_weights(engine, precision) else torch.float32
    got = {parameter.dtype for parameter in started.module.parameters()}
    stage = int(started.zero_optimization_stage())
    if stage != engine.zero or got != {dtype}:
        found = ", ".join(map(str, got))
        raise RuntimeError(f"DeepSpeed was asked for ZeRO {engine.zero} with {dtype} and runs {stage} with {found}")


def _exchange_parameters(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Let an optimizer that was built on a model's shapes update the parameters of the same names."""
    for group in optimizer.param_groups:
        group["params"] = [parameters[name] for name in group["names"]]


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).double().square().sum().sqrt()


def _hold_with_root(deepspeed: Any, model: Any) -> None:
    """Gather what is in no block for the whole pass, as FSDP's root does: a head may use another module's weight."""
    in_blocks = {parameter for _, block in model.blocks() for parameter in block.parameters()}
    own = set(model.parameters(recurse=False))
    for parameter in model.parameters():
        if parameter not in in_blocks and parameter not in own:
            deepspeed.zero.register_external_parameter(model, parameter)
