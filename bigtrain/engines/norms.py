"""Norms of gradients, weights and updates by group of parameters, as named metrics.

The norms are known only after a step's update, so the all-reduce of the next step reduces them. Each rank contributes
the squares of the shards that it counts, as for the norm that is used for gradient clipping.
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
    """Records the norms of an engine at a regular interval of steps.

    Args:
        recorder: The engine's recorder.
        parameters: The parameters whose shards this rank counts, by qualified name; no shard is empty.
        every: Interval between two records, in steps. Steps `every` - 1, 2 `every` - 1, ... are recorded, so that the
            metrics of steps `every`, 2 `every`, ... contain the norms of the preceding step.
        depth: Number of leading components of a qualified name that define a group: 1 "layers", 2 "layers.0".
        kinds: Which norms to record. "update" keeps a copy of the weights during the step.
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
        """Decide whether this step is recorded; to be called before its backward pass.

        Args:
            step: Number of steps that precede this one.
        """
        self._due = (step + 2) % self._every == 0

    @torch.no_grad()
    def before_update(self, scale: Tensor) -> None:
        """Record the norms of gradients and weights; to be called when the gradients of the sum of losses are complete.

        Args:
            scale: Factor that makes them the gradients of the mean loss, before clipping.
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
        """Record the norms of the updates; to be called after the optimizer's step."""
        if self._before:
            weights = [local(parameter) for parameter in self._parameters]
            self._record("update", list(torch._foreach_sub(weights, self._before)))
            self._before = []

    def _record(self, kind: Kind, tensors: list[Tensor], scale: Tensor | None = None) -> None:
        """Record the norm of each group, and of all groups together; `StepNumbers` has the total gradient norm."""
        norms = torch.stack(torch._foreach_norm(tensors)).double()
        if scale is not None:
            norms = norms * scale
        with self._recorder.active(of_ranks=True):
            if kind != "gradient":
                record_metric(f"{kind}_norm", norms, "norm")
            for group, indices in self._groups.items():
                record_metric(f"{kind}_norm/{group}", norms[indices], "norm")


def group_of(name: str, depth: int) -> str:
    """The group of a parameter: the first `depth` components of its qualified name, never its last component.

    A name of one component is a group by itself.
    """
    parts = name.split(".")
    return ".".join(parts[: min(depth, max(1, len(parts) - 1))])


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter; zeros if the step has not used the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
