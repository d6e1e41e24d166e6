"""Initial weights that do not depend on the layout: sampled in blocks of rows, each by a generator of its own.

Block b of a parameter comes from a CPU generator seeded by a hash of (seed, qualified name, b), so a rank
samples only the blocks that its shard overlaps, and any sharding yields the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigtrain.models.contract import Init, Model, Normal, Ones

ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class Part:
    """Which part of a parameter a plain tensor is, where the rest lies on other ranks."""

    shape: tuple[int, ...]
    """Shape of the full (unsharded) parameter."""
    offset: tuple[int, ...]
    """Where the part begins in it."""
    local_shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        """All of it."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))


def initialise(model: nn.Module, seed: int, parts: Mapping[str, Part] | None = None) -> None:
    """Give every parameter of a `contract.Model` its first value, in place; plain tensors and DTensors.

    Args:
        parts: The plain tensors, by qualified name, that are parts of larger ones.

    Raises:
        ValueError: A parameter without a rule, or a rule without a parameter.
    """
    rules = cast(Model, model).initialisers()
    parameters = dict(model.named_parameters())
    if rules.keys() != parameters.keys():
        wrong = sorted(rules.keys() ^ parameters.keys())
        raise ValueError(f"initialisers() and named_parameters() differ in {', '.join(wrong)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local, offset = _local(parameter)
            shape = tuple(parameter.shape)
            if parts and name in parts and not isinstance(parameter, DTensor):
                shape, offset = parts[name].shape, parts[name].offset
            fill(local, offset, shape, rules[name], seed, name)


def materialise(model: nn.Module, device: torch.device, seed: int, *, values: bool = True) -> None:
    """Give a module its first values on `device`, in place: its own where it has them, else those of its rules.

    Holders of one parameter keep sharing it.

    Args:
        values: Whether parameters get their first values; False leaves fake tensors, which have none, as they are.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.to(device)
        return
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (first, own_name), *others in holders.values():
        for module, name in others:
            module._parameters[name] = first._parameters[own_name]
    if values:
        initialise(model, seed)


def fill(part: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], rule: Init, seed: int, name: str) -> None:
    """Give one part of a parameter its first values, in place.

    Args:
        part: A plain tensor, the values of the parameter that begin at `offset`.
        shape: Shape of the full (unsharded) parameter.
        name: Its qualified name.
    """
    if isinstance(rule, Normal):
        _fill_normal(part, offset, shape, rule.std, seed, name)
    else:
        part.fill_(1.0 if isinstance(rule, Ones) else 0.0)


def block_seed(seed: int, name: str, block: int) -> int:
    """The 63-bit seed of one block of rows. (The CPU generator of torch 2 uses the lower 32 of them.)"""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _local(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of a parameter that lies on this rank, and where it begins in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, (0,) * parameter.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offset)


def _fill_normal(
    local: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], std: float, seed: int, name: str
) -> None:
    if local.numel() == 0:
        return
    rows_per_block = ROWS_PER_BLOCK if len(shape) > 1 else max(1, shape[0] if shape else 1)
    first, last = (offset[0], offset[0] + local.shape[0]) if shape else (0, 1)
    columns = tuple(slice(at, at + size) for at, size in zip(offset[1:], local.shape[1:], strict=True))
    for block in range(first // rows_per_block, (last - 1) // rows_per_block + 1):
        begin = block * rows_per_block
        rows = min(rows_per_block, (shape[0] if shape else 1) - begin)
        generator = torch.Generator().manual_seed(block_seed(seed, name, block))
        values = torch.empty((rows, *shape[1:])).normal_(0.0, std, generator=generator)
        if not shape:
            local.copy_(values[0])
            continue
        start, stop = max(first, begin), min(last, begin + rows)
        local[start - first : stop - first].copy_(values[(slice(start - begin, stop - begin), *columns)])
