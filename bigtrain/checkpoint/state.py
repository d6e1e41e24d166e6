"""The state of a run as one flat dictionary of tensors by qualified names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from bigtrain.config import UserError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and recompute put into qualified names: *how*, not *what*."""


def qualified_name(name: str) -> str:
    """A parameter's name without what compilation and recompute put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def flatten(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds, sharing memory with the model and the optimizer.

    "model.NAME" for each parameter (a tied one once, under its first name) and persistent buffer;
    "optimizer.NAME.KEY" for each tensor of the optimizer's state, step counts too; to have those before the
    first step, see `materialise_optimizer`.

    Raises:
        UserError: The optimizer keeps state that is no tensor, or trains what is no parameter of the model.
    """
    names = {parameter: qualified_name(name) for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {f"model.{name}": parameter for parameter, name in names.items()}
    state |= {f"model.{qualified_name(name)}": buffer for name, buffer in _persistent_buffers(model)}
    if optimizer is None:
        return state
    if any(parameter not in names for group in optimizer.param_groups for parameter in group["params"]):
        raise UserError("the optimizer trains a tensor that is no parameter of the model")
    # In the model's order, not that of the parameter groups.
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise UserError(
                    f"{type(optimizer).__name__} keeps {key!r} as {kind}, not as a tensor",
                    name,
                    "use adamw, adam, sgd or rmsprop",
                )
            state[f"optimizer.{name}.{key}"] = value
    return state


def materialise_optimizer(optimizer: Optimizer) -> None:
    """Give an optimizer the state that its first step would make, in zeros, to read a checkpoint into.

    A step from zeros equals torch's own first step. State that is already there is left as it is.

    Raises:
        UserError: It is none of torch's AdamW, Adam, RMSprop and SGD (the last without dampening).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                fresh = _fresh_state(optimizer, group, parameter)
                if fresh:
                    optimizer.state[parameter] = fresh


def _fresh_state(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """As the `_init_group` of torch's own optimizers makes it."""

    def zeros() -> Tensor:
        return torch.zeros_like(parameter.detach(), memory_format=torch.preserve_format)

    if isinstance(optimizer, (AdamW, Adam)):
        state = {"step": _step_count(group, parameter), "exp_avg": zeros(), "exp_avg_sq": zeros()}
        return state | ({"max_exp_avg_sq": zeros()} if group["amsgrad"] else {})
    if isinstance(optimizer, RMSprop):
        state = {"step": _step_count(group, parameter), "square_avg": zeros()}
        state |= {"momentum_buffer": zeros()} if group["momentum"] > 0 else {}
        return state | ({"grad_avg": zeros()} if group["centered"] else {})
    if isinstance(optimizer, SGD) and not (group["momentum"] and group["dampening"]):
        # torch takes the first gradient itself as the buffer: what zeros give, too, unless it is dampened.
        return {"momentum_buffer": zeros()} if group["momentum"] else {}
    raise UserError(
        f"the state of {type(optimizer).__name__} with these options cannot be made without a step",
        fix="use adamw, adam, rmsprop, or sgd without dampening",
    )


def _step_count(group: dict[str, Any], parameter: Tensor) -> Tensor:
    """A zero where the optimizer counts: on the device if its kernels read it there, else on the CPU."""
    fused = bool(group.get("fused"))
    wide = torch.get_default_dtype() == torch.float64 and not fused
    device = parameter.device if fused or group.get("capturable") else torch.device("cpu")
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
