"""Builds a torch optimizer with its parameter groups from an optimizer's config and named parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from bigtrain.config import UserError, nearest
from bigtrain.optim.config import OptimizerConfig, ParameterGroup

_LISTS = ("params", "names")


def build_optimizer(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    all_names: Collection[str] | None = None,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """The optimizer that `config` describes; see `OptimizerConfig.build`."""
    optimizer = config.make(parameter_groups(config, named_parameters, all_names, lr_scale))
    # Needed to read a checkpoint into the optimizer before its first step: `checkpoint.state.materialise_optimizer`.
    optimizer.zero_state = config.zero_state  # type: ignore[attr-defined]
    return optimizer


def parameter_groups(
    config: OptimizerConfig,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    all_names: Collection[str] | None = None,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict[str, Any]]:
    """Torch parameter groups: one for each combination of lr_scale and weight_decay; two if only some are sharded.

    Parameters that are frozen or need no gradient are in no group. If no given parameter is trained, the result is a
    single group without parameters.

    Args:
        config: The optimizer section with the rules for groups and frozen parameters.
        named_parameters: Qualified names and parameters.
        all_names: Names of the full model's parameters, if `named_parameters` are only some of them.
        lr_scale: The model's factor of the learning rate of a parameter; see `OptimizerConfig.build`.

    Returns:
        Dicts with the keys params, names, lr, lr_scale and weight_decay.

    Raises:
        UserError: A pattern of `groups` or `frozen` matches no parameter of the full model, all parameters are
            frozen, or the model scales learning rates and the optimizer does not support that.
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
                f"The nearest name is {near!r}." if near else f"Use names such as {', '.join(names[:3])}.",
            )
    if all(is_frozen(config, name) for name in names):
        raise UserError(
            "every parameter is frozen: there is nothing to train", "optimizer.frozen", "Freeze fewer parameters."
        )
    # All parameters of a pipeline stage may be frozen, and torch cannot build an optimizer without a parameter group.
    nothing = {"params": [], "names": [], "lr": config.lr, "lr_scale": 1.0, "weight_decay": 0.0}
    return [part for group in groups.values() for part in _of_one_kind(group)] or [nothing]


def _of_one_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group, divided in two if it has both sharded and unsharded tensors, which torch's kernels do not take together.

    Unsharded scalars stay: torch takes them as replicated.
    """
    sharded = [isinstance(parameter, DTensor) for parameter in group["params"]]
    fits = [is_sharded or parameter.ndim == 0 for is_sharded, parameter in zip(sharded, group["params"], strict=True)]
    if not any(sharded) or all(fits):
        return [group]
    return [
        {**group, **{key: [one for one, fit in zip(group[key], fits, strict=True) if fit is wanted] for key in _LISTS}}
        for wanted in (True, False)
    ]


def is_frozen(config: OptimizerConfig, name: str) -> bool:
    """Whether the parameter of this qualified name matches a pattern of `frozen`, so that it is not trained."""
    return any(fnmatchcase(name, pattern) for pattern in config.frozen)


def _weight_decay(config: OptimizerConfig, rule: ParameterGroup | None, parameter: torch.Tensor) -> float:
    if rule is not None and rule.weight_decay is not None:
        return rule.weight_decay
    return config.weight_decay if parameter.ndim >= 2 else 0.0
