"""Checks that a checkpoint contains everything that passes and updates of a plain module change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bigtrain.config import UserError
from bigtrain.models.plain.compared import State, alike, equal, is_persistent, leaves
from bigtrain.models.plain.facts import Facts
from bigtrain.models.plain.network import Network


def kept_state(network: Network, start: State | None = None) -> dict[str, Tensor]:
    """Buffers and the numbers of extra states, by what messages call them.

    Args:
        start: If given, their values there instead of the present ones.
    """
    buffers = dict(network.named_buffers()) if start is None else start.buffers
    extra = network.copied_extra_state() if start is None else start.extra
    found = {f"the buffer '{name}'": buffers[name].clone() for name in network.own_buffers}
    for name, value in extra.items():
        numbers = [one.double().flatten() for one in map(_as_tensor, leaves(value)) if one is not None]
        found[f"get_extra_state() of '{name or type(network.network).__name__}'"] = torch.cat(
            [torch.zeros(0), *numbers]
        )
    return found


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value) if isinstance(value, (bool, int, float)) else None


def lost_buffers(network: Network) -> dict[str, list[Any]]:
    """Copies of the buffers that checkpoints do not contain, by qualified name."""
    return {name: [buffer.clone()] for name, buffer in network.named_buffers() if not is_persistent(network, name)}


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names whose values differ between two snapshots; a name that only one of them has counts."""
    names = dict.fromkeys((*a, *b))
    return [name for name in names if not (name in a and name in b and alike(_listed(a[name]), _listed(b[name])))]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def refuse_changed_parameters(network: Network, start: State, where: str) -> None:
    """Refuse a module whose forward has changed a parameter, or created a parameter or a buffer that is to be saved.

    Args:
        start: The state before the first pass.
    """
    for name, parameter in network.named_parameters():
        if name not in start.parameters:
            raise UserError(
                f"forward() creates the parameter '{name}', which the optimizer does not have",
                where,
                "Create it in __init__; where its size depends on the input, use a lazy layer of torch, such as "
                "nn.LazyLinear.",
            )
        value, version, pointer = start.parameters[name]
        if parameter._version == version and parameter.data_ptr() == pointer and equal(parameter.detach(), value):
            continue
        raise UserError(
            f"forward() changes the parameter '{name}', but each rank holds only a shard of it",
            where,
            "Change it in a method after_step(self), which runs after each update with the full parameters. Keep "
            "what it needs from the batch in a buffer, computed with sum_over_batch() of bigtrain.models.plain.",
        )
    for name, _ in network.named_buffers():
        if name not in start.buffers and is_persistent(network, name):
            raise UserError(
                f"forward() creates the buffer '{name}', which a resumed run would not have when it loads a checkpoint",
                where,
                "Create it in __init__, or register it with persistent=False if each pass can make it again.",
            )


def refuse_lost_state(
    network: Network, facts: Facts, where: str, moved: Sequence[str], changed: Sequence[str], repeats: bool
) -> None:
    """Refuse a module whose passes depend on state that no checkpoint contains.

    Args:
        moved: Names of the attributes that differ after two passes of the same batch.
        changed: Names of all attributes that a pass changes.
        repeats: Whether two passes of the same batch gave the same result.
    """
    listed = {name for name, _ in network._with_extra_state()}
    moved = [name for name in moved if name.rpartition(".")[0] not in listed]
    non_persistent = [name for name in facts.moving if not is_persistent(network, name)]
    if repeats and not moved and not non_persistent:
        return
    for name in (*moved, *non_persistent, *([] if repeats else changed)):
        raise UserError(
            f"forward() changes '{name}', which is not saved in checkpoints, and later passes "
            f"{'depend on it' if not repeats else 'could depend on it'}",
            where,
            "Initialize it in each pass: batches are shuffled, so a hidden state has no past. Take what depends "
            'on the step from batch["step"], compute what depends on the weights in after_step(self), and return '
            "counters from get_extra_state().",
        )
    raise UserError(
        "Two passes of one batch from the same seed differ: forward() reads a clock, a generator that is not seeded, "
        "or state outside of the module, such as a global variable",
        where,
        "Draw from the default generator of torch, NumPy or random, which are seeded at each step. Keep state in "
        "buffers, or return it from get_extra_state().",
    )
