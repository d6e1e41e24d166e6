"""One adapter for each strategy of Accelerate: it checks what Accelerate built, and gives access to state by name.

All strategies average gradients over the ranks; the engine multiplies by the number of ranks to undo it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from bigtrain.checkpoint.state import flatten, materialise_optimizer
from bigtrain.config import UserError, nearest
from bigtrain.engines.accelerate.config import AccelerateConfig
from bigtrain.engines.deepspeed.partitions import Partitions
from bigtrain.engines.deepspeed.start import import_deepspeed, leave_process_group
from bigtrain.models.init import Part

_SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_CPU", "ACCELERATE_USE_MEGATRON_LM")
"""Environment variables that override Accelerate's arguments, and that Accelerate itself sets."""


class Plain:
    """One process: model and optimizer without wrappers."""

    sharded = False
    """Whether this rank holds only a shard of the gradients."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        """The model to be called, with its wrapper."""
        self.module = model
        """The model without its wrapper; its parameters have their qualified names."""
        self.optimizer = optimizer
        """The optimizer whose parameter groups take the learning rate."""
        self.inner_optimizer = optimizer
        """torch's optimizer, which does the update."""

    def check(self) -> None:
        """Check that Accelerate built what the config requests.

        Raises:
            UserError: Accelerate did not build what the config requests.
        """

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """A context for one micro-batch that delays the reduction of gradients to the last one, if that saves traffic.

        Args:
            last: Whether this is the last micro-batch of the step.
        """
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass of a micro-batch, which adds to the gradients."""
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """This rank's gradients or shards of gradients, averaged over the ranks, to be scaled in place."""
        gradients = (parameter.grad for parameter in self.module.parameters())
        return [gradient for gradient in map(_local, gradients) if gradient is not None and gradient.numel()]

    def whole_gradients(self) -> dict[str, Tensor]:
        """The full gradients, averaged over the ranks, by qualified name; for tests and tools. Collective."""
        return {
            name: _whole(parameter.grad).detach().clone()
            for name, parameter in self.module.named_parameters()
            if parameter.grad is not None
        }

    def step(self) -> None:
        """Run the optimizer's step, and clear the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def after_evaluation(self) -> None:
        """Free parameters that remain gathered after a forward pass without a backward pass."""

    def state(self) -> dict[str, Tensor]:
        """See `contract.Engine.state`. Collective."""
        materialise_optimizer(self.optimizer)
        return flatten(self.module, self.optimizer)

    def state_loaded(self) -> None:
        """Update the tensors that compute from `state`, after a load. Collective."""

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Replicated(Plain):
    """DDP: each rank holds a copy of parameters, gradients and optimizer state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(model, optimizer)
        self.module = model.module if isinstance(model, DistributedDataParallel) else model

    def check(self) -> None:
        if not isinstance(self.model, DistributedDataParallel):
            raise _replaced("ddp", f"a model that is {type(self.model).__name__}, not DistributedDataParallel")

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        assert isinstance(self.model, DistributedDataParallel)
        return nullcontext() if last else self.model.no_sync()


class FullySharded(Plain):
    """FSDP2: parameters, gradients and optimizer state are DTensors."""

    sharded = True

    def check(self) -> None:
        world = dist.get_world_size()
        if not isinstance(self.model, FSDPModule):
            raise _replaced("fsdp2", f"a model that is {type(self.model).__name__}, not an FSDPModule")
        for name, parameter in self.module.named_parameters():
            if not isinstance(parameter, DTensor):
                raise _replaced("fsdp2", f"{name!r} as a plain tensor")
            if parameter.placements != (Shard(0),) or parameter.device_mesh.size() != world:
                raise _replaced(
                    "fsdp2", f"{name!r} as {parameter.placements} over {parameter.device_mesh.size()} ranks"
                )
        own = {id(parameter) for parameter in self.module.parameters() if parameter.requires_grad}
        if {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]} != own:
            raise _replaced("fsdp2", "an optimizer of other tensors than the sharded parameters")

    def after_evaluation(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class Zero2(Plain):
    """DeepSpeed's ZeRO-2: each rank holds full parameters, and flat shards of gradients and optimizer state.

    A shard may begin or end inside a parameter.
    """

    sharded = True

    def __init__(self, model: Any, optimizer: Any, shapes: dict[str, torch.Size]) -> None:
        super().__init__(model, optimizer)
        self.module = getattr(model, "module", model)
        self._engine: Any = model
        self._zero: Any = optimizer
        # `check` refuses an optimizer that is not DeepSpeed's.
        self.inner_optimizer = getattr(optimizer, "optimizer", optimizer)
        self._shapes = shapes

    def check(self) -> None:
        stage = getattr(self._engine, "zero_optimization_stage", lambda: None)()
        if stage != 2 or not getattr(self._zero, "partition_gradients", False):
            kind = f"{type(self.model).__name__} with {type(self.optimizer).__name__}"
            raise _replaced("zero2", f"{kind} at stage {stage}")
        if self._engine.dp_world_size != dist.get_world_size():
            raise _replaced("zero2", f"a group of {self._engine.dp_world_size} ranks")

    def backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def gradients(self) -> list[Tensor]:
        parts = self._zero.averaged_gradients.values()
        return [gradient for part in parts if part is not None for gradient in part if gradient.numel()]

    def whole_gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return {name: safe_get_full_grad(parameter).clone() for name, parameter in self._trained().items()}

    def step(self) -> None:
        self._engine.step()

    def state(self) -> dict[str, Tensor]:
        self._partitions.materialise_optimizer()
        state = self._partitions.state()
        return state | {name: tensor for name, tensor in flatten(self.module).items() if name not in state}

    def state_loaded(self) -> None:
        self._partitions.refresh()

    def close(self) -> None:
        import deepspeed

        leave_process_group(deepspeed)

    def _trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are not frozen; DeepSpeed flattens only these."""
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    @cached_property
    def _partitions(self) -> Partitions:
        return Partitions(
            self._engine,
            self._zero.optimizer,
            self._trained(),
            lambda name: Part.whole(self._shapes[name]),
            dist.get_rank(),
        )


def prepare(
    engine: AccelerateConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> Plain:
    """Let Accelerate prepare the model and its optimizer for `engine.strategy`, and check the result.

    Raises:
        UserError: Accelerate did not build what the config requests, or `passthrough` has a setting that the strategy
            does not have.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    release()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    given = plugins(engine, device, compute_dtype)
    if engine.strategy == "fsdp2" and given["fsdp_plugin"].transformer_cls_names_to_wrap is None:
        given["fsdp_plugin"].transformer_cls_names_to_wrap = _blocks(model)
    # On a CPU, Accelerate ignores DeepSpeed with cpu=True; without cpu=True it ignores the other ranks (except for the
    # backend of their group).
    accelerator = Accelerator(cpu=device.type == "cpu" and engine.strategy != "zero2", **given)
    if engine.strategy == "fsdp2" and accelerator.state.distributed_type is not DistributedType.FSDP:
        # Accelerate shards on accelerators only; on a CPU it would silently use DDP instead.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = given["fsdp_plugin"]
    with _tied_weights_together(model) if engine.strategy == "fsdp2" else nullcontext():
        prepared, wrapped = accelerator.prepare(model, optimizer)
    if engine.strategy == "fsdp2" and "reshard_after_forward" not in engine.passthrough:
        _keep_last_block(prepared, given["fsdp_plugin"].transformer_cls_names_to_wrap)
    inner = getattr(wrapped, "optimizer", wrapped)
    made: Plain
    if engine.strategy == "zero2":
        made = Zero2(prepared, inner, shapes)
    else:
        made = (Replicated if engine.strategy == "ddp" else FullySharded)(prepared, inner)
    made.check()
    return made


def plugins(engine: AccelerateConfig, device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `accelerate.Accelerator` for the engine's strategy.

    Raises:
        UserError: `passthrough` has a setting that the strategy does not have.
    """
    arguments = {"ddp": _ddp_arguments, "fsdp2": _fsdp2_arguments, "zero2": _zero2_arguments}
    if engine.strategy == "zero2":
        import_deepspeed(device)
    return arguments[engine.strategy](engine.passthrough, compute_dtype)


def release() -> None:
    """Reset Accelerate's process-wide state, so that it does not affect the next engine of this process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in _SWITCHES:
        os.environ.pop(name, None)


def _blocks(model: Any) -> list[str]:
    """Class names of a model's blocks, which FSDP2 shards one by one; without blocks that hold tied weights."""
    tied = {id(parameter) for parameter in _tied(model)}
    named = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in named]
    holding = {
        type(block).__name__ for block in blocks if any(id(parameter) in tied for parameter in block.parameters())
    }
    return sorted({type(block).__name__ for block in blocks} - holding)


def _keep_last_block(model: nn.Module, names: Collection[str]) -> None:
    """Keep the last block gathered after the forward pass: the backward pass begins with it."""
    kinds = {f"FSDP{name}" for name in names}
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if blocks and isinstance(blocks[-1], FSDPModule):
        blocks[-1].set_reshard_after_forward(False, recurse=False)


@contextmanager
def _tied_weights_together(model: Any) -> Iterator[None]:
    """Make Accelerate shard embedding and head with the rest of the model, if other modules share weights too.

    Accelerate shards embedding and head as a group of their own. A weight that a third module shares would become two
    separate parameters. Examples are T5, whose encoder and decoder use the same embedding, and the bias of BERT's head.
    """
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    own = {id(end.weight) for end in ends if end is not None}
    tied = _tied(model)
    if all(id(parameter) in own and len(names) == 2 for parameter, names in tied.items()):
        yield
        return
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_input_embeddings, model.get_output_embeddings


def _tied(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Parameters that several modules share, each with all its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {parameter: held for parameter, held in names.items() if len(held) > 1}


def _ddp_arguments(passthrough: Mapping[str, Any], _: torch.dtype) -> dict[str, Any]:
    from accelerate.utils import DistributedDataParallelKwargs

    _check_passthrough(passthrough, [field.name for field in dataclasses.fields(DistributedDataParallelKwargs)])
    # Buffers are equal on all ranks from the start and stay equal, so they need no broadcast.
    return {"kwargs_handlers": [DistributedDataParallelKwargs(**{"broadcast_buffers": False, **passthrough})]}


def _fsdp2_arguments(passthrough: Mapping[str, Any], compute_dtype: torch.dtype) -> dict[str, Any]:
    from accelerate.utils import FullyShardedDataParallelPlugin

    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    own = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "mixed_precision_policy": policy,
        "cpu_ram_efficient_loading": False,
    }
    fields = [field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)]
    _check_passthrough(passthrough, fields, own)
    return {"fsdp_plugin": FullyShardedDataParallelPlugin(**own, **passthrough)}


def _zero2_arguments(passthrough: Mapping[str, Any], _: torch.dtype) -> dict[str, Any]:
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    _check_passthrough(passthrough, DeepSpeedZeroConfig.model_fields, ("stage",))
    config = {
        # The engine does gradient accumulation, scaling and clipping, so DeepSpeed is set to one unscaled micro-batch.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, **passthrough},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    group = InitProcessGroupKwargs(backend=backend)
    return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config), "kwargs_handlers": [group]}


def _check_passthrough(given: Mapping[str, Any], known: Collection[str], taken: Collection[str] = ()) -> None:
    for key in given:
        if key in taken:
            raise UserError(f"'{key}' is set by bigtrain", f"engine.passthrough.{key}", "Remove it.")
        if key not in known:
            near = nearest(key, known)
            raise UserError(
                f"Unknown key '{key}'",
                f"engine.passthrough.{key}",
                f"Did you mean '{near}'?" if near else f"Known: {', '.join(sorted(known))}.",
            )


def _replaced(strategy: str, what: str) -> UserError:
    return UserError(
        f"Accelerate was configured for {strategy}, but built {what}",
        "engine.strategy",
        "bigtrain does not support this version of accelerate. Install the version in constraints.txt.",
    )


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole
