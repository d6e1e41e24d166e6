"""The state of a run as one flat dictionary from qualified names to tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from bigtrain.config import UserError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Name parts that torch.compile and activation recomputation add: they depend on the execution, not on the recipe."""


def qualified_name(name: str) -> str:
    """A parameter's name without the parts that torch.compile and activation recomputation add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def flatten(model: nn.Module, *optimizers: Optimizer) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds, sharing memory with the model and its optimizers.

    The key is "model.NAME" for each parameter (a tied one once, under its first name) and each persistent buffer. It is
    "optimizer.NAME.KEY" for each tensor of the optimizer's state, including step counts. Before the first step,
    `materialise_optimizer` creates this state.

    Raises:
        UserError: The optimizer keeps state that is not a tensor, or trains a tensor that is not a parameter of the
            model.
    """
    names = {parameter: qualified_name(name) for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {f"model.{name}": parameter for parameter, name in names.items()}
    state |= {f"model.{qualified_name(name)}": buffer for name, buffer in _persistent_buffers(model)}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if any(parameter not in names for group in groups for parameter in group["params"]):
        raise UserError("the optimizer trains a tensor that is not a parameter of the model")
    # In the order of the model's parameters, not of the parameter groups.
    kept = {
        parameter: (optimizer, own) for optimizer in optimizers for parameter, own in optimizer.state.items() if own
    }
    for parameter, name in names.items():
        if parameter not in kept:
            continue
        optimizer, own = kept[parameter]
        for key, value in own.items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                kind = type(value).__name__
                raise UserError(
                    f"{type(optimizer).__name__} keeps {key!r} as {kind}, not as a tensor",
                    name,
                    "Keep it as a tensor: a checkpoint stores only tensors.",
                )
            state[f"optimizer.{name}.{key}"] = value
    return state


def materialise_optimizer(optimizer: Optimizer) -> None:
    """Create the optimizer state that the first step would create, so that a checkpoint can be loaded into it.

    The optimizer's config section defines this state (`OptimizerConfig.zero_state`). Existing state is not changed.

    Raises:
        UserError: The optimizer was not built from an `OptimizerConfig`.
    """
    zero_state: Callable[[Tensor], dict[str, Tensor]] | None = getattr(optimizer, "zero_state", None)
    if zero_state is None:
        raise UserError(
            f"The state of {type(optimizer).__name__} cannot be created without an optimizer step",
            fix="Build it from an OptimizerConfig, whose zero_state() describes its state.",
        )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                fresh = zero_state(parameter.detach())
                if fresh:
                    optimizer.state[parameter] = fresh


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer
