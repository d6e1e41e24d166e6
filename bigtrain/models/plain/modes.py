"""Function modes that stay active in the backward pass, where torch.utils.checkpoint recomputes activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode


class StaysOn(TorchFunctionMode):
    """A function mode that routes torch calls through `call`, also in the backward pass of a loss.

    torch itself disables every function mode before `Tensor.backward` runs.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.backward and _is_of_loss(args, kwargs):
            # The same call as in torch.autograd.backward, with this mode and the modes below it active.
            one = torch.ones_like(args[0])
            with self:
                return _engine_run_backward(
                    args, (one,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )  # fmt: skip
        return self.call(function, args, kwargs)

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function of torch, or a replacement."""
        raise NotImplementedError


def _is_of_loss(args: Any, kwargs: Any) -> bool:
    """Whether `Tensor.backward` is called as an engine calls it: on a scalar, without other arguments."""
    return len(args) == 1 and args[0].ndim == 0 and all(one is None or one is False for one in kwargs.values())
