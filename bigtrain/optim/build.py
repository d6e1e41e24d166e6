"""From an optimizer's config and named parameters to a torch optimizer with its parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch

from bigtrain.config import UserError, nearest
from bigtrain.optim.config import OptimizerConfig, ParameterGroup


def build_optimizer(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    all_names: Collection[str] | None = None,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """The optimizer that `config` describes; see `OptimizerConfig.build`."""
    optimizer = config.make(parameter_groups(config, named_parameters, all_names, lr_scale))
    # For whoever reads a checkpoint into it before its first step; see `checkpoint.state.materialise_optimizer`.
    optimizer.zero_state = config.zero_state  # type: ignore[attr-defined]
    return optimizer


def parameter_groups(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    all_names: Collection[str] | None = None,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Parameters with equal settings together: dicts of params, names, lr, lr_scale and weight_decay.

    Parameters that are frozen, or need no gradient, are in none of them. Where none of those given is trained, there is
    one group of nothing.

    Args:
        all_names: Of the full model's parameters, if those given are a part of them.
        lr_scale: See `OptimizerConfig.build`.

    Raises:
        UserError: A group's pattern, or a frozen one, matches no parameter of the full model; or nothing is left; or
            the model scales learning rates, and not for this optimizer.
    """
    names: list[str] = []
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        names.append(name)
        if is_frozen(config, name) or not parameter.requires_grad:
            continue
        rule = next((group for group in config.groups if fnmatchcase(name, group.pattern)), None)
        factor = lr_scale(name)
        if factor != 1:
            config.check_mup()
        scale = factor * (1.0 if rule is None else rule.lr_scale)
        decay = _weight_decay(config, rule, parameter) / factor
        empty = {"params": [], "names": [], "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay}
        group = groups.setdefault((scale, decay), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    names = names if all_names is None else list(all_names)
    rules = {f"optimizer.groups.{index}.pattern": rule.pattern for index, rule in enumerate(config.groups)}
    rules |= {f"optimizer.frozen.{index}": pattern for index, pattern in enumerate(config.frozen)}
    for place, pattern in rules.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names)
            raise UserError(
                f"the pattern {pattern!r} matches no parameter",
                place,
                f"the nearest name is {near!r}" if near else f"names look like {', '.join(names[:3])}",
            )
    if all(is_frozen(config, name) for name in names):
        raise UserError("every parameter is frozen: there is nothing to train", "optimizer.frozen", "freeze fewer")
    # A stage of a pipeline may be frozen as a whole, and torch makes no optimizer of nothing at all.
    nothing = {"params": [], "names": [], "lr": config.lr, "lr_scale": 1.0, "weight_decay": 0.0}
    return list(groups.values()) or [nothing]


def is_frozen(config: OptimizerConfig, name: str) -> bool:
    """Whether a parameter, by its qualified name, is not trained."""
    return any(fnmatchcase(name, pattern) for pattern in config.frozen)


def _weight_decay(config: OptimizerConfig, rule: ParameterGroup | None, parameter: torch.Tensor) -> float:
    if rule is not None and rule.weight_decay is not None:
        return rule.weight_decay
    return config.weight_decay if parameter.ndim >= 2 else 0.0
