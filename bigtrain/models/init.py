"""Initial weights that do not depend on the layout: they are sampled in blocks of rows, each with its own generator.

Block b of a parameter comes from a CPU generator seeded with a hash of (seed, qualified name, b). So a rank samples
only the blocks that its shard overlaps, and any sharding yields the same values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigtrain.models.contract import Init, Model, Normal, Ones, Zeros

ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class Part:
    """Which part of a full parameter a plain tensor holds; other ranks hold the rest."""

    shape: tuple[int, ...]
    """Shape of the full (unsharded) parameter."""
    offset: tuple[int, ...]
    """Index, in each dimension of the full parameter, at which the part begins."""
    local_shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        """A part that is the full parameter."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))


def initialise(model: nn.Module, seed: int, parts: Mapping[str, Part] | None = None) -> None:
    """Initialise every parameter of a `contract.Model` in place; parameters may be plain tensors or DTensors.

    Args:
        parts: By qualified name, the parameters that are plain tensors but hold only a part of the full parameter.

    Raises:
        ValueError: A parameter has no rule, or a rule has no parameter.
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


def usual_rules(model: nn.Module, tables: Collection[str]) -> dict[str, Init]:
    """Rules for `Model.initialisers`: tables are normal with std 0.02, other matrices with variance 1 / inputs.

    Biases are 0, and other vectors, such as the weights of norms, are 1.

    Args:
        tables: Names of the embedding tables.
    """
    rules: dict[str, Init] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            rules[name] = Normal(0.02 if name in tables else 1 / math.sqrt(parameter.shape[1]))
        else:
            rules[name] = Zeros() if name.endswith("bias") else Ones()
    return rules


def materialise(model: nn.Module, device: torch.device, seed: int, *, values: bool = True) -> None:
    """Move a module to `device` and initialise it, in place.

    A module that already has values, with no parameter on the meta device, keeps them. Otherwise the module's rules
    initialise all parameters. Tied parameters stay tied.

    Args:
        values: Whether parameters are initialised; False is for fake tensors, which have no values.
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
    """Initialise one part of a parameter in place.

    Args:
        part: A plain tensor that holds the part of the parameter that begins at `offset`.
        shape: Shape of the full (unsharded) parameter.
        name: Qualified name of the parameter.
    """
    if isinstance(rule, Normal):
        _fill_normal(part, offset, shape, rule.std, seed, name)
    else:
        part.fill_(1.0 if isinstance(rule, Ones) else 0.0)


def block_seed(seed: int, name: str, block: int) -> int:
    """The 63-bit seed of one block of rows. (The CPU generator of torch 2 uses only the lower 32 bits.)"""
    digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _local(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a parameter, and the index in each dimension of the full parameter at which it begins."""
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
