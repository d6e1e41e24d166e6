"""Skips an optimizer update according to a flag on the device, so that the host need not read the flag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigtrain.models.layers import local


class Guard:
    """Makes a torch optimizer leave parameters and state unchanged if a flag is set.

    Fused kernels accept such a flag themselves; Adam's step counts then stay unchanged too. For other optimizers, the
    guard copies parameters and state before each update, which doubles their memory. After the update it restores them
    if the flag is set.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Attach the guard to an optimizer, which updates as usual until `arm` sets a flag."""
        self._optimizer: Any = optimizer
        self._bad: Tensor | None = None
        self._before: dict[Tensor, dict[str | None, Tensor]] = {}
        if not optimizer.defaults.get("fused"):
            optimizer.register_step_pre_hook(self._keep)
            optimizer.register_step_post_hook(self._put_back)

    def arm(self, bad: Tensor) -> None:
        """Set the flag (a boolean scalar tensor) for all updates until the next call; true skips the update."""
        self._bad = bad
        if self._optimizer.defaults.get("fused"):
            self._optimizer.found_inf = bad.to(torch.float32)

    @property
    def bad(self) -> Tensor:
        """The flag of the newest update."""
        assert self._bad is not None
        return self._bad

    def _keep(self, *_: Any) -> None:
        self._before = {
            parameter: {key: value.detach().clone() for key, value in self._tensors(parameter)}
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        }

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        bad = self._bad
        for parameter, before in self._before.items():
            for key, value in self._tensors(parameter):
                if bad is not None:
                    # State that this update has created counts as zero before it.
                    old = before[key] if key in before else torch.zeros_like(value)
                    value.copy_(torch.where(bad.to(value.device), old, value))
        self._before = {}

    def _tensors(self, parameter: Tensor) -> list[tuple[str | None, Tensor]]:
        """This rank's parts of the parameter (with the key None) and of the tensors of its optimizer state."""
        state = self._optimizer.state.get(parameter, {})
        found = [(None, parameter), *((key, value) for key, value in state.items() if isinstance(value, Tensor))]
        return [(key, local(value)) for key, value in found]
