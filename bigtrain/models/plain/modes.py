"""Function modes that stay on in the backward pass, where torch.utils.checkpoint computes activations again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode


class StaysOn(TorchFunctionMode):
    """What its block calls goes through `call`, also in the backward pass of a loss.

    torch itself takes every function mode off before `Tensor.backward` runs.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.backward and _is_of_loss(args, kwargs):
            # As torch.autograd.backward calls it, with this mode and those below it on.
            one = torch.ones_like(args[0])
            with self:
                return _engine_run_backward(
                    args, (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )  # fmt: skip
        return self.call(function, args, kwargs)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function of torch, or what stands in its place."""
        raise NotImplementedError


def _is_of_loss(args: Any, kwargs: Any) -> bool:
    """Whether `Tensor.backward` is called as an engine does: for a number, with no other arguments."""
    return len(args) == 1 and args[0].ndim == 0 and all(one is None or one is False for one in kwargs.values())
