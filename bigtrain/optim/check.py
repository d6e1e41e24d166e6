"""A check that an optimizer's `zero_state` matches the state that its steps create.

A resumed run reads its checkpoint into that state, so the two must have the same keys, shapes, dtypes and values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bigtrain.config import UserError
from bigtrain.optim.config import OptimizerConfig

if TYPE_CHECKING:
    import torch

_SHAPES = ((3, 4), (5,))
"""Shapes of the test parameters: a matrix and a vector, because an optimizer may keep different state for each."""
_RELATIVE = 1e-6
"""Relative tolerance in FP32: adding a zero state may change the rounding of the first step."""


def check_zero_state(config: OptimizerConfig) -> None:
    """Check that a first step from `zero_state` equals the optimizer's own first step, on a small matrix and vector.

    Args:
        config: The optimizer to check, usually one of a plugin.

    Raises:
        UserError: `zero_state` is missing, differs from a step's state in keys, shapes or dtypes, or leads to a
            different first step.
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
                f"zero_state() returns {_named(given)}, but a step creates {_named(made)}",
                where,
                "Return the state of one parameter before its first step, with the same keys, shapes and types as "
                "after it.",
            )
        again, _ = _first_step(config, shape, described)
        if not torch.allclose(stepped, again, rtol=_RELATIVE, atol=0):
            raise UserError(
                "the first step from zero_state() is not the optimizer's own first step",
                where,
                "Return the optimizer's own initial values, so that a resumed run continues identically.",
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
