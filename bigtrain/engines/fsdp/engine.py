"""The FSDP2 engine: plain PyTorch in one process, fully sharded over several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from bigtrain.checkpoint.state import flatten, materialise_optimizer, qualified_name
from bigtrain.config import UserError
from bigtrain.engines.clipping import scale_and_clip, square_of
from bigtrain.engines.config import EngineParts
from bigtrain.engines.contract import ONLY_LOSSES, Measuring, MicroBatch, StepResult, Totals
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.engines.fsdp.parts import Part, PartsResult, build_parts, part_loss
from bigtrain.engines.fsdp.plain import PlainSteps
from bigtrain.engines.norms import Kind, Norms
from bigtrain.engines.rank import COMPUTE_DTYPES, peak_memory_bytes, reseed, set_determinism, to_device
from bigtrain.engines.scaling import LossScale
from bigtrain.engines.step import StepReducer
from bigtrain.metrics import record_metric
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.layers import local
from bigtrain.models.plain.network import Network
from bigtrain.models.sums import Sums
from bigtrain.optim.build import is_frozen
from bigtrain.optim.clip import ClipConfig
from bigtrain.parallel.apply import ParallelModel, build_parallel_model
from bigtrain.parallel.config import Mesh
from bigtrain.parallel.mesh import build_mesh, gradient_mesh, pick_device
from bigtrain.parallel.pipeline import ends_group
from bigtrain.parallel.shard import begin_pass, reshard
from bigtrain.parallel.tensor import sum_gradients


class FSDPEngine:
    """Trains a native model or a plain module; each rank holds its shards. See `contract.Engine`."""

    def __init__(
        self,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer | Sequence[Part],
        *,
        clip: ClipConfig | None = None,
        seed: int,
        device: torch.device,
        sizes: Mesh | None = None,
        mesh: DeviceMesh | None = None,
        loss_scale: LossScale | None = None,
        stream_is_part: bool = False,
    ) -> None:
        """Wrap a model that is already parallel, and its optimizers.

        Args:
            model: The model as `parallel.apply` builds it.
            optimizer: The optimizer of all parameters; or parts with one each, in the order in which a step updates.
            clip: The section `optimizer.clip`. Parts have their own instead.
            seed: The run's seed.
            device: This rank's device.
            sizes, mesh: The mesh axes over all ranks; both None in a single process.
            loss_scale: The loss scale of FP16; None for other precisions.
            stream_is_part: Whether the residual stream is sharded over the tp axis (sequence parallelism).
        """
        sizes = sizes or Mesh()
        self.model: Any = model.module
        self.parts = [Part.of(optimizer, clip)] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self.optimizer = self.parts[0].optimizer
        self.device = device
        self._seed = seed
        self._mesh = mesh
        self._loss_scale = loss_scale
        self._context = model.context
        rank = dist.get_rank() if mesh is not None else 0
        self.data_parallel_rank = sizes.data_parallel_rank(rank)
        self.data_parallel_size = sizes.data_parallel
        world_size = 1 if mesh is None else dist.get_world_size()
        self.reducer = StepReducer(device, rank, world_size, sizes, stream_is_part)
        if loss_scale is not None:
            self.reducer.recorder.weight_scale = loss_scale.scale
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        self._names = {parameter: qualified_name(name) for name, parameter in named}
        self._counted = {parameter for parameter in self._names if counts_in_norm(parameter)}
        self.pipeline = model.pipeline
        self.shared_by_ends = model.shared_by_ends
        self._shared_by_ends = [parameter for name, parameter in named if name in model.shared_by_ends]
        self._ends: dist.ProcessGroup | None = None
        if model.shared_by_ends and mesh is not None:
            self._ends = ends_group(mesh["pp"], mesh)
            if mesh["pp"].get_local_rank() > 0:
                self._counted.difference_update(self._shared_by_ends)
        self._tensor_partial = [parameter for name, parameter in named if name in model.tensor_partial]
        self._norms: Norms | None = None
        self.plain: PlainSteps | None = None
        if isinstance(self.model, Network):
            over = None if mesh is None else gradient_mesh(mesh)
            self.plain = PlainSteps(self.model, over, seed, device)
            if self.data_parallel_rank > 0:
                self._counted.difference_update(self.plain.whole)

    @classmethod
    def build(cls, engine: FSDPConfig, parts: EngineParts) -> FSDPEngine:
        """Build device, mesh, model with its initial weights, and optimizer from the config's sections. Collective."""
        layout, optimizer = parts.layout, parts.optimizer
        device = pick_device(parts.ranks.local_rank)
        set_determinism(engine, device)
        sizes, mesh = build_mesh(layout, parts.ranks, device)
        built = build_parallel_model(
            parts.model,
            parts.vocab_size,
            layout=layout,
            mesh=mesh,
            device=device,
            compute_dtype=COMPUTE_DTYPES[parts.precision],
            seed=parts.seed,
            recompute=engine.recompute,
            compile_blocks=engine.compile,
        )
        named = list(built.module.named_parameters())
        for name, parameter in named:
            if is_frozen(optimizer, qualified_name(name)):
                parameter.requires_grad_(False)
        return cls(
            built,
            build_parts(optimizer, parts.model.parts, named, built.all_names, parts.model.lr_scale),
            seed=parts.seed,
            device=device,
            sizes=sizes,
            mesh=mesh,
            loss_scale=LossScale(device) if parts.precision == "fp16" else None,
            stream_is_part=layout.sequence_parallel and sizes.tp > 1,
        )

    def train_step(self, step: int, micro_batches: list[MicroBatch], lr: float, vote: float = 0.0) -> StepResult:
        """See `contract.Engine.train_step`. Each part of the model that is due is updated in turn, by its own loss."""
        if self._norms is not None:
            self._norms.begin(step)
        results: dict[str, StepResult] = {}
        for part in self.parts:
            if not part.is_due(step):
                continue
            sums = self.backward(step, micro_batches, part)
            results[part.name] = self.reduce_and_scale(sums, 0.0 if results else vote, part)
            part.update(lr)
            if self._norms is not None:
                self._norms.after_update()
            if self.plain is not None:
                self.plain.after_update(part.guard.bad)
            # Gradients of other parts are cleared too: a generator's loss also has gradients in the discriminator.
            self.model.zero_grad(set_to_none=True)
        if self.plain is not None:
            self.plain.after_step([part.guard.bad for part in self.parts if part.name in results])
        return PartsResult(results) if len(self.parts) > 1 else results[self.parts[0].name]

    def backward(self, step: int, micro_batches: list[MicroBatch], part: Part | None = None) -> Sums:
        """Run forward and backward; `grad` then holds the gradient of the sum of losses over all ranks, undivided.

        Args:
            part: The part whose loss is computed; None: the first part.

        Returns:
            The sums over this rank's micro-batches. In FP16 they carry the loss scale, as the gradients do.
        """
        reseed(self._seed, step)
        self.model.train()
        if self.plain is not None:
            self.plain.begin(part or self.parts[0])
        with self.reducer.recorder.active():
            sums = self._passes(step, micro_batches)
        if self._shared_by_ends and self._ends is not None:
            sum_gradients(_gradients(self._shared_by_ends), self._ends)
        if self._tensor_partial and self._mesh is not None:
            sum_gradients(_gradients(self._tensor_partial), self._mesh["tp"].get_group())
        if self.plain is not None:
            self.plain.after_backward(sums.weight)
        return sums

    def _passes(self, step: int, micro_batches: list[MicroBatch]) -> Sums:
        """Run forward and backward of each micro-batch."""
        if self.pipeline is not None:
            return self.pipeline.backward([self._scaled(to_device(arrays, self.device)) for arrays in micro_batches])
        sums = Sums.of(micro_batches, self.device)
        for number, arrays in enumerate(micro_batches, 1):
            begin_pass(self.model, last=number == len(micro_batches))
            with self._passing(step, arrays, number - 1, len(micro_batches)) as batch:
                batch = self._scaled(batch)
                result = LossSum(*self.model(batch))
                result.loss.backward()
            sums.add(result, batch)
        return sums

    def reduce_and_scale(self, sums: Sums, vote: float, part: Part | None = None) -> StepResult:
        """Reduce the step's sums in one all-reduce, then turn the gradients into the clipped ones of the mean loss.

        The gradients change in place.

        Args:
            sums: What `backward` returned.
            vote: This rank's vote; see `contract.Engine.train_step`.
            part: The part whose gradients are scaled; None: the first part.
        """
        part = part or self.parts[0]
        gradients = _gradients(part.parameters)
        counted = _gradients([parameter for parameter in part.parameters if parameter in self._counted])
        total = self.reducer.reduce(square_of(counted, self.device), vote, sums)
        # A gradient that is not finite on one rank makes the sum over all ranks not finite.
        bad = total.bad(total.square)
        part.guard.arm(bad)
        scale = 1.0 / total.safe_weight
        norm = total.square.sqrt() * scale
        if self._norms is not None:
            self._norms.before_update(scale)
        scale_and_clip(gradients, scale, norm, part.clip, part.parameters)
        loss_scale = None
        if self._loss_scale is not None:
            loss_scale = self._loss_scale.scale.double()
            # A step in which no token counts is skipped too, but is no overflow.
            self._loss_scale.update(bad & (total.weight != 0))
        return total.result(norm, bad, loss_scale)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[list[MicroBatch]], measuring: Measuring = ONLY_LOSSES) -> Totals:
        """See `contract.Engine.evaluate`."""
        self.model.eval()
        sums = Sums(self.device, measuring.sources)
        with self.reducer.evaluating(measuring.wanted).active():
            if self.pipeline is not None:
                arrived = (to_device(arrays, self.device) for batch in batches for arrays in batch)
                sums = self.pipeline.forward(arrived, measuring.sources)
            for arrays in (arrays for micro_batches in batches for arrays in micro_batches):
                for part in reversed(self.parts):
                    self._evaluate(part, arrays, sums, measuring)
        # FSDP keeps parameters gathered if no backward pass follows, but `state` needs the shards.
        reshard(self.model)
        return self.reducer.totals(sums)

    def _evaluate(self, part: Part, arrays: MicroBatch, sums: Sums, measuring: Measuring) -> None:
        """Run one forward pass for the loss of a part. The first part's loss is the model's; evaluators measure it."""
        if self.plain is not None:
            self.plain.begin(part)
        with self._evaluating(arrays) as batch:
            result = LossSum(*self.model(batch))
            if part.name:
                weight = result.weight.detach()
                record_metric(part_loss(part.name).name, result.loss / weight.clamp(min=1e-30), weight=weight)
            if part is self.parts[0]:
                sums.add(result, batch)
                for measure in measuring.passes:
                    measure(self.model, batch)

    def state(self) -> dict[str, Tensor]:
        """See `contract.Engine.state`. The state of an optimizer that has not stepped yet is created first."""
        optimizers = [part.optimizer for part in self.parts]
        for optimizer in optimizers:
            materialise_optimizer(optimizer)
        extra = self.plain.network.extra_state() if self.plain is not None else {}
        return flatten(self.model, *optimizers) | (self._loss_scale.state() if self._loss_scale else {}) | extra

    def state_loaded(self) -> None:
        """See `contract.Reloaded.state_loaded`: plain modules read their extra state from the loaded tensors."""
        if self.plain is not None:
            self.plain.network.take_extra_state()

    def record_norms(self, every: int, depth: int, kinds: Sequence[Kind]) -> None:
        """See `contract.RecordsNorms.record_norms`.

        Raises:
            UserError: The model has several parts, each with its own gradient.
        """
        if len(self.parts) > 1:
            raise UserError(
                "Norms by group are not recorded for a model of several parts",
                "callbacks",
                "Remove the callback norms: metrics.jsonl has gradient_norm/NAME for each part.",
            )
        counted = {name: one for one, name in self._names.items() if one in self._counted and local(one).numel()}
        self._norms = Norms(self.reducer.recorder, counted, every=every, depth=depth, kinds=kinds)

    def _scaled(self, batch: Batch) -> Batch:
        return batch if self._loss_scale is None else self._loss_scale.scaled(batch)

    def _passing(self, step: int, arrays: MicroBatch, number: int, passes: int) -> AbstractContextManager[Batch]:
        if self.plain is not None:
            return self.plain.passing(step, arrays, number, passes)
        return nullcontext(self._batch(arrays))

    def _evaluating(self, arrays: MicroBatch) -> AbstractContextManager[Batch]:
        return nullcontext(self._batch(arrays)) if self.plain is None else self.plain.evaluating(arrays)

    def _batch(self, arrays: MicroBatch) -> Batch:
        """A micro-batch on the device; under context parallelism, this rank's part of each sequence."""
        batch = to_device(arrays, self.device)
        return batch if self._context is None else self._context.part(batch)

    def memory_bytes(self) -> int:
        """See `contract.Engine.memory_bytes`."""
        return peak_memory_bytes(self.device)

    def close(self) -> None:
        """See `contract.Engine.close`."""
        if self._mesh is not None and dist.is_initialized():
            dist.destroy_process_group()


def counts_in_norm(parameter: Tensor) -> bool:
    """Whether this rank counts its part of a parameter in norms: its index is 0 on each axis that replicates it."""
    if not isinstance(parameter, DTensor):
        return True
    place = parameter.device_mesh.get_coordinate()
    assert place is not None  # A rank holds only parameters whose mesh contains it.
    return all(at == 0 for at, placement in zip(place, parameter.placements, strict=True) if placement.is_replicate())


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards of gradients, without empty ones."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [part for part in map(local, gradients) if part.numel()]
