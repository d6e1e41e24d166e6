"""The parts of a model that a step updates one after another, each with its own optimizer. Most models are one part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from bigtrain.config import UserError
from bigtrain.engines.contract import StepNumbers, StepResult
from bigtrain.engines.guard import Guard
from bigtrain.metrics import Metric, Value, merge
from bigtrain.optim.clip import ClipConfig
from bigtrain.optim.config import OptimizerConfig
from bigtrain.optim.schedule import PartRates


@dataclass(frozen=True)
class Part:
    """The parameters that one optimizer updates, from one loss."""

    name: str
    """The model's name for the part; empty if the model has no parts."""
    optimizer: torch.optim.Optimizer
    guard: Guard
    clip: ClipConfig | None
    every: int
    parameters: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, clip: ClipConfig | None, name: str = "", every: int = 1) -> Part:
        """The part that consists of all parameters of an optimizer."""
        parameters = tuple(one for group in optimizer.param_groups for one in group["params"])
        return cls(name, optimizer, Guard(optimizer), clip, every, parameters)

    def is_due(self, step: int) -> bool:
        """Whether a step (counted from 0) updates this part."""
        return (step + 1) % self.every == 0

    def update(self, lr: float) -> None:
        """Run the optimizer's step.

        Args:
            lr: The run's learning rate, or a `PartRates` with one learning rate for each part.
        """
        rate = lr.of[self.name] if isinstance(lr, PartRates) else lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.optimizer.step()


def build_parts(
    config: OptimizerConfig,
    order: Sequence[str],
    named: Sequence[tuple[str, nn.Parameter]],
    all_names: Collection[str] | None = None,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[Part]:
    """The parts of a model on this rank, in the order in which a step updates them.

    Args:
        order: Names of the model's parts; empty if the model has no parts.
        named: This rank's parameters, by qualified name.
        all_names: Names of the full model's parameters.
        lr_scale: The model's factor of the learning rate of a parameter, by qualified name (`ModelConfig.lr_scale`).

    Raises:
        UserError: A trained parameter is in no part, a parameter is in two parts, or a part has no parameters.
    """
    if not order:
        return [Part.of(config.build(named, all_names, lr_scale), config.clip)]
    patterns = {name: config.parts[name].parameters or (f"{name}.*",) for name in order}
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in order}
    for name, parameter in named:
        found = [part for part, own in patterns.items() if any(fnmatchcase(name, pattern) for pattern in own)]
        if len(found) > 1 or (not found and parameter.requires_grad):
            raise UserError(
                f"the parameter '{name}' is in " + (f"the parts {' and '.join(found)}" if found else "no part"),
                "optimizer.parts",
                "Give each part patterns under 'parameters' that match only its own parameters, or name it under "
                "optimizer.frozen.",
            )
        if found:
            members[found[0]].append((name, parameter))
    parts = []
    for name, own in members.items():
        if not own:
            fix = f"No parameter matches {', '.join(patterns[name])}: set optimizer.parts.{name}.parameters."
            raise UserError(f"the part '{name}' has no parameters", "optimizer.parts", fix)
        section = config.of_part(name)
        parts.append(Part.of(section.build(own, all_names, lr_scale), section.clip, name, config.parts[name].every))
    return parts


class PartsResult(StepResult):
    """The results of a step that updates several parts: the first part's, and each part's loss and norm as metrics."""

    def __init__(self, results: Mapping[str, StepResult]) -> None:
        self._results = dict(results)

    def read(self) -> StepNumbers:
        """See `StepResult.read`."""
        numbers = {name: result.read() for name, result in self._results.items()}
        metrics: dict[str, Value] = {}
        for name, one in numbers.items():
            merge(metrics, one.metrics)
            if one.skipped:
                continue
            metrics[f"loss/{name}"] = Value(part_loss(name), one.loss, one.weight)
            norm = Metric(f"gradient_norm/{name}", "mean")
            metrics[norm.name] = Value(norm, one.gradient_norm, 1.0)
        return replace(
            next(iter(numbers.values())),
            votes=sum(one.votes for one in numbers.values()),
            unknown=sum(one.unknown for one in numbers.values()),
            skipped=max(one.skipped for one in numbers.values()),
            metrics=metrics,
        )


def part_loss(name: str) -> Metric:
    """The loss of one part, as a metric."""
    return Metric(f"loss/{name}", "mean")
