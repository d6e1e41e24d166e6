"""Norms of gradients, weights and updates by group of parameters, as named metrics.

They are known when a step's update is done, so they travel with the all-reduce of the next step. Each rank adds the
squares of the parts that count on it, as for the norm that the gradient is clipped by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from bigtrain.metrics import Recorder, record_metric
from bigtrain.models.layers import local

Kind = Literal["gradient", "weight", "update"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


class Norms:
    """Records the norms of every `every`-th step of an engine.

    Args:
        recorder: The engine's.
        parameters: By qualified name, those of which this rank's part counts, without empty parts.
        every: Steps from one record to the next. Step every - 1 is the first, so that the numbers of steps `every`,
            2 `every`, ... show the norms of the step before.
        depth: Parts of a qualified name that make a group: 1 "layers", 2 "layers.0".
        kinds: Which norms. An update's takes a copy of the weights while the step lasts.
    """

    def __init__(
        self,
        recorder: Recorder,
        parameters: Mapping[str, Tensor],
        *,
        every: int,
        depth: int,
        kinds: Sequence[Kind] = KINDS,
    ) -> None:
        self._recorder = recorder
        self._every, self._kinds = every, kinds
        self._parameters = list(parameters.values())
        self._groups: dict[str, list[int]] = {}
        for index, name in enumerate(parameters):
            self._groups.setdefault(group_of(name, depth), []).append(index)
        self._due = False
        self._before: list[Tensor] = []

    def begin(self, step: int) -> None:
        """Before a step's backward pass.

        Args:
            step: Steps done before it.
        """
        self._due = (step + 2) % self._every == 0

    @torch.no_grad()
    def before_update(self, scale: Tensor) -> None:
        """When the gradients of the sum of losses are complete.

        Args:
            scale: What makes them the gradient of the mean loss, before clipping.
        """
        if not self._due or not self._parameters:
            return
        weights = [local(parameter) for parameter in self._parameters]
        if "gradient" in self._kinds:
            gradients = [local(_gradient(parameter)) for parameter in self._parameters]
            self._record("gradient", gradients, scale)
        if "weight" in self._kinds:
            self._record("weight", weights)
        if "update" in self._kinds:
            self._before = [weight.clone() for weight in weights]

    @torch.no_grad()
    def after_update(self) -> None:
        """When the optimizer has stepped."""
        if self._before:
            weights = [local(parameter) for parameter in self._parameters]
            self._record("update", list(torch._foreach_sub(weights, self._before)))
            self._before = []

    def _record(self, kind: Kind, tensors: list[Tensor], scale: Tensor | None = None) -> None:
        """Record the norm of each group, and of all together; the gradient's own is in every step's numbers."""
        norms = torch.stack(torch._foreach_norm(tensors)).double()
        if scale is not None:
            norms = norms * scale
        with self._recorder.active(of_ranks=True):
            if kind != "gradient":
                record_metric(f"{kind}_norm", norms, "norm")
            for group, indices in self._groups.items():
                record_metric(f"{kind}_norm/{group}", norms[indices], "norm")


def group_of(name: str, depth: int) -> str:
    """The group of a parameter: the first parts of its qualified name, without the parameter's own."""
    parts = name.split(".")
    return ".".join(parts[: min(depth, max(1, len(parts) - 1))])


def _gradient(parameter: Tensor) -> Tensor:
    """Zeros for a parameter that the step has not used."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
