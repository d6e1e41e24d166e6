"""The DeepSpeed engine: our models under ZeRO 0 to 3, by the same laws as under FSDP.

DeepSpeed reduces gradients, spreads what its stage spreads, and calls the optimizer, which is torch's own. It averages
gradients over the data-parallel ranks; that, and nothing else, is undone: a hook on the optimizer multiplies the
reduced gradients by ranks / weight and clips them, just before they are used.

Under tensor parallelism the model consists of plain tensors of this rank's parts, as DeepSpeed takes no DTensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigtrain.checkpoint.flat import Box, FlatPart
from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.engines.config import DeepSpeedConfig, Precision
from bigtrain.engines.contract import MicroBatch, StepResult
from bigtrain.engines.deepspeed_config import check_passthrough, deepspeed_config, low_precision_weights
from bigtrain.engines.deepspeed_groups import ModelParallelUnit, count_once_in_norm
from bigtrain.engines.deepspeed_model import Plan, plan_model, spread
from bigtrain.engines.deepspeed_partitions import Partitions
from bigtrain.engines.deepspeed_start import import_deepspeed, join_process_group, leave_process_group
from bigtrain.engines.rank import COMPUTE_DTYPES, peak_memory_bytes, reseed, set_determinism, to_device
from bigtrain.models.config import ModelConfig
from bigtrain.models.init import fill, initialise
from bigtrain.optim.config import OptimizerConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.parallel.mesh import Ranks, build_mesh, pick_device
from bigtrain.parallel.recompute import recompute_blocks
from bigtrain.parallel.tensor import sum_gradients_as_they_come


class DeepSpeedEngine:
    """Model and optimizer inside a DeepSpeed engine; see `contract.Engine`."""

    def __init__(
        self,
        deepspeed: Any,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        *,
        plan: Plan,
        sizes: Mesh,
        unit: ModelParallelUnit | None,
        clip: float | None,
        seed: int,
        device: torch.device,
    ) -> None:
        """Take over what `build` has started.

        Args:
            deepspeed: The imported package.
            engine: DeepSpeed's engine.
            optimizer: torch's optimizer inside it.
            plan: What this rank's model is made of.
            sizes: Of the axes over all ranks.
            unit: The groups of ranks, where they hold different parts of the model.
            clip: Largest norm of the gradient; None: no limit.
            seed: The run's.
            device: The rank's.
        """
        self.engine = engine
        self.model: Any = engine.module
        self.optimizer = optimizer
        self.device = device
        rank = dist.get_rank()
        self.data_parallel_rank = sizes.data_parallel_rank(rank)
        self.data_parallel_size = sizes.data_parallel
        self._deepspeed = deepspeed
        self._plan = plan
        self._unit = unit
        self._counts_loss = sizes.counts_loss(rank)
        self._clip = clip
        self._seed = seed
        self._stage = int(engine.zero_optimization_stage())
        first = unit is None or unit.get_model_parallel_rank() == 0
        self._copies = frozenset() if first else plan.shapes.keys() - plan.parts.keys()
        parameters = dict(self.model.named_parameters())
        self._counted = [parameter for name, parameter in parameters.items() if name not in self._copies]
        self._partitions = None
        if self._stage:
            place = self.data_parallel_rank
            self._partitions = Partitions(engine, optimizer, parameters, plan.part, place, self._copies)
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
            UserError: A passthrough that DeepSpeed does not take.
        """
        device = pick_device(ranks.local_rank)
        set_determinism(engine, device)
        deepspeed = import_deepspeed(device)
        join_process_group(deepspeed, ranks, device)
        sizes, mesh = build_mesh(layout, ranks, device)
        config = deepspeed_config(engine, precision, device)
        check_passthrough(config, engine.passthrough)
        built, plan = plan_model(model, vocab_size, layout, mesh)
        unit = ModelParallelUnit(mesh) if mesh is not None and sizes.tp > 1 else None
        # On the whole shapes, which the parameters that are built now have not all got.
        with torch.device("meta"):
            inner = optimizer.build((name, nn.Parameter(torch.empty(shape))) for name, shape in plan.shapes.items())
        if engine.zero == 3:
            dtype = torch.bfloat16 if low_precision_weights(engine, precision) else torch.float32
            group = None if unit is None else unit.get_data_parallel_group()
            spread(deepspeed, built, config=config, group=group, device=device, dtype=dtype)
        else:
            built.to_empty(device=device)
            initialise(built, seed, plan.parts)
        built.compute_dtype = COMPUTE_DTYPES[precision]
        if engine.recompute == "full":
            recompute_blocks([block for _, block in built.blocks()])
        parameters = dict(built.named_parameters())
        _exchange_parameters(inner, parameters)
        if unit is not None:
            count_once_in_norm(parameters, set(plan.parts))
        started, *_ = deepspeed.initialize(model=built, optimizer=inner, config=config, mpu=unit)
        _check_got(started, engine, precision, sizes)
        if unit is not None:
            sum_gradients_as_they_come(built, plan.partial, unit.get_tensor_model_parallel_group())
        self = cls(
            deepspeed, started, inner,
            plan=plan, sizes=sizes, unit=unit, clip=optimizer.clip, seed=seed, device=device,
        )  # fmt: skip
        self._fill()
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
        if not self._counts_loss:
            sums = torch.zeros_like(sums)
        vector = torch.cat([sums, torch.full_like(sums[:1], vote)])
        dist.all_reduce(vector)
        loss, self._weight, votes = vector.unbind()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._stage == 0:
            # Reduced already, and stepped all at once.
            self._norm = self._norm_of_counted()
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
        dist.all_reduce(sums if self._counts_loss else sums.zero_())
        loss_sum, weight_sum = sums.tolist()
        return loss_sum, weight_sum

    def state(self) -> dict[str, Tensor]:
        """See `contract.Engine.state`: FP32 weights, as `FlatPart`s where ranks share them."""
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
        """While the optimizer steps: what it is given, by qualified names, as in `state`; for tests and tools."""
        if self._partitions is not None:
            return self._partitions.gradients()
        named = self.model.named_parameters()
        return {name: self._shown(name, parameter.grad) for name, parameter in named if parameter.grad is not None}

    def _shown(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a parameter, or of what belongs to it, as a part of the whole."""
        part = self._plan.parts.get(name)
        if part is None:
            return tensor.detach()
        return FlatPart(tensor.detach().view(-1), 0, part.shape, Box(part.offset, part.local_shape))

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
    def _fill(self) -> None:
        """The initial FP32 weights that every layout has; DeepSpeed's own start from rounded or other ones."""
        if self._partitions is None:
            return
        for owned in self._partitions.owned:
            rule = self._plan.initialisers[owned.name]
            for (offset, _), piece in owned.view(owned.flat).pieces():
                fill(piece, offset, owned.part.shape, rule, self._seed, owned.name)
        self._partitions.refresh()

    def _norm_of_counted(self) -> Tensor:
        """Norm of the reduced gradients in the parameters, each part counted once; float64."""
        square = torch.zeros_like(self._norm)
        gradients = [parameter.grad for parameter in self._counted if parameter.grad is not None]
        if gradients:
            square = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
        if self._unit is not None:
            dist.all_reduce(square, group=self._unit.get_model_parallel_group())
        return square.sqrt()


def _check_got(started: Any, engine: DeepSpeedConfig, precision: Precision, sizes: Mesh) -> None:
    """Nothing may be replaced without a word: DeepSpeed must run the stage and the weights that were asked for."""
    dtype = torch.bfloat16 if low_precision_weights(engine, precision) else torch.float32
    got = {parameter.dtype for parameter in started.module.parameters()}
    stage = int(started.zero_optimization_stage())
    if stage != engine.zero or got != {dtype}:
        found = ", ".join(map(str, got))
        raise RuntimeError(f"DeepSpeed was asked for ZeRO {engine.zero} with {dtype} and runs {stage} with {found}")
    if started.dp_world_size != sizes.data_parallel:
        raise RuntimeError(f"DeepSpeed reduces over {started.dp_world_size} ranks, not over {sizes.data_parallel}")


def _is_of(key: str, name: str) -> bool:
    """Whether an entry of the state belongs to a parameter."""
    return key == f"model.{name}" or key.startswith(f"optimizer.{name}.")


def _exchange_parameters(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    """Let an optimizer that was built on a model's shapes update the parameters of the same names."""
    for group in optimizer.param_groups:
        group["params"] = [parameters[name] for name in group["names"]]
