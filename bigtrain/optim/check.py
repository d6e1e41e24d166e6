"""Whether an optimizer's `zero_state` is the state that its steps make: else a checkpoint of it could not be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtrain.config import UserError
from bigtrain.optim.config import OptimizerConfig

if TYPE_CHECKING:
    import torch

_SHAPES = ((3, 4), (5,))
"""A matrix and a vector: optimizers may keep other state for each."""
_RELATIVE = 1e-6
"""FP32: a sum with a zero may round otherwise than the sum without it."""


def check_zero_state(config: OptimizerConfig) -> None:
    """Take one step on a small matrix and a small vector, and one from `zero_state`; both must do the same.

    Raises:
        UserError: `zero_state` is missing, lacks a key, has another shape or type, or leads to another first step.
    """
    import torch

    where = f"optimizer.name: {config.name}"
    for shape in _SHAPES:
        stepped, state = _first_step(config, shape, None)
        try:
            described = config.zero_state(torch.zeros(shape))
        except TypeError as error:
            raise UserError(
                str(error), where, "A resumed run reads its checkpoint into that state; return {} if there is none."
            ) from None
        made, given = _forms(state), _forms(described)
        if made != given:
            raise UserError(
                f"zero_state() gives {_named(given)}, and a step makes {_named(made)}",
                where,
                "Return the state of one parameter before its first step, with the keys, shapes and types of after it.",
            )
        again, _ = _first_step(config, shape, described)
        if not torch.allclose(stepped, again, rtol=_RELATIVE, atol=0):
            raise UserError(
                "the first step from zero_state() is not the optimizer's own first step",
                where,
                "Return the values that the optimizer itself begins with, so that a resumed run goes on alike.",
            )


def _first_step(
    config: OptimizerConfig, shape: tuple[int, ...], state: dict[str, torch.Tensor] | None
) -> tuple[torch.Tensor, dict[str, Any]]:
    import torch

    values = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    parameter = torch.nn.Parameter(values.clone())
    parameter.grad = values.flip(0) + 0.3
    group = {"params": [parameter], "names": ["weight"], "lr": config.lr, "lr_scale": 1.0, "weight_decay": 0.0}
    optimizer = config.make([group])
    if state:
        optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
    optimizer.step()
    return parameter.detach(), dict(optimizer.state[parameter])


def _forms(state: dict[str, Any]) -> dict[str, str]:
    return {
        key: f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if hasattr(value, "dtype")
        else type(value).__name__
        for key, value in sorted(state.items())
    }


def _named(forms: dict[str, str]) -> str:
    return ", ".join(f"{key}: {form}" for key, form in forms.items()) or "nothing"
