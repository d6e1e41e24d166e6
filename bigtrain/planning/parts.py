"""Shapes and sizes of the part of each parameter that a rank holds, computed without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import accumulate

from bigtrain.engines.config import Precision
from bigtrain.models.config import TensorRole
from bigtrain.models.decoder_config import TENSOR_PLAN, DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh

FP32 = 4
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per element in the matmuls and the residual stream."""


@dataclass(frozen=True)
class Parameter:
    """The tp part of a parameter on a rank, and the rank's shard of that part."""

    name: str
    role: TensorRole
    shape: tuple[int, ...]
    """Shape of the tp part: the full parameter if tp does not split it."""
    shard_dim: int
    """The dimension that is sharded (ZeRO-3): 0 (rows), or 1 (columns) if tp splits the rows unevenly."""
    own_share: int
    """Size of that dimension in this rank's shard."""

    @property
    def elements(self) -> int:
        """Number of elements of the tp part."""
        return math.prod(self.shape)

    @property
    def own_elements(self) -> int:
        """Number of elements of this rank's shard."""
        return self.elements // self.shape[self.shard_dim] * self.own_share

    def padded_elements(self, shards: int) -> int:
        """Number of elements of the tp part, padded so that all shards have one size."""
        entries = self.shape[self.shard_dim]
        return self.elements // entries * filled(entries, shards)


@dataclass(frozen=True)
class StageParts:
    """The parameters of one stage of a rank, in groups that FSDP gathers together."""

    is_first: bool
    is_last: bool
    root: list[Parameter]
    """Parameters outside of blocks: the embedding on the first stage, norm and head on the last one."""
    blocks: list[tuple[str, list[Parameter]]]
    """Name and parameters of each block."""

    @property
    def groups(self) -> list[tuple[str, list[Parameter]]]:
        """Name and parameters of the root and of each block, without empty groups."""
        return [group for group in (("root", self.root), *self.blocks) if group[1]]


@dataclass(frozen=True)
class Parts:
    """The parameters of one rank."""

    stages: list[StageParts]
    shards: int
    """Number of ranks over which each parameter is sharded: dp_shard x cp."""

    @classmethod
    def of(cls, model: DecoderConfig, vocab_size: int, sizes: Mesh, layout: LayoutConfig, rank: int) -> Parts:
        """The parameters of a rank. They are cached, because a search requests the same ones many times."""
        return _parts_of(model, vocab_size, sizes, layout.split(model.block_costs(vocab_size)), rank)

    @property
    def all(self) -> list[Parameter]:
        """The parameters of all stages."""
        return [parameter for stage in self.stages for _, group in stage.groups for parameter in group]


@lru_cache(maxsize=4096)
def _parts_of(model: DecoderConfig, vocab_size: int, sizes: Mesh, split: tuple[int, ...], rank: int) -> Parts:
    place = sizes.coordinates(rank)
    shards, own = sizes.dp_shard * sizes.cp, place["dp_shard"] * sizes.cp + place["cp"]
    tp_place = place["tp"]
    of_block: list[tuple[str, Parameter]] = []
    outside: list[Parameter] = []
    for name, shape in _shapes_of_one_block(model, vocab_size):
        parameter = _parameter(name, shape, sizes.tp, tp_place, shards, own)
        if name.startswith(FIRST_BLOCK):
            of_block.append((name.removeprefix(FIRST_BLOCK), parameter))
        else:
            outside.append(parameter)
    ends = [0, *accumulate(split)]
    stages = []
    for number in range(place["pp"], len(ends) - 1, sizes.pp):
        blocks = [
            (f"layers.{block}", [replace(one, name=f"layers.{block}.{name}") for name, one in of_block])
            for block in range(ends[number], ends[number + 1])
        ]
        first, last = number == 0, number == len(ends) - 2
        root = [one for one in outside if _is_held(one.name, model.tied, first=first, last=last)]
        stages.append(StageParts(first, last, root, blocks))
    return Parts(stages, shards)


FIRST_BLOCK = "layers.0."


def _shapes_of_one_block(model: DecoderConfig, vocab_size: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the first block's parameters, equal in all blocks, and of parameters outside of blocks."""
    return list(model.model_copy(update={"layers": 1}).parameter_shapes(vocab_size).items())


def _parameter(name: str, shape: tuple[int, ...], tp: int, tp_place: int, shards: int, own: int) -> Parameter:
    role = _role(name)
    dim = SPLIT_DIM.get(role)
    shard_dim = 1 if dim == 0 and shape[0] % tp else 0
    if dim is not None:
        shape = (*shape[:dim], chunk(shape[dim], tp, tp_place), *shape[dim + 1 :])
    return Parameter(name, role, shape, shard_dim, chunk(shape[shard_dim], shards, own))


SPLIT_DIM: dict[TensorRole, int] = {"column": 0, "vocab": 0, "row": 1}


def chunk(entries: int, ranks: int, rank: int) -> int:
    """Number of `entries` that a rank has if they are split as by `torch.chunk`: the last ranks may have fewer."""
    share = -(-entries // ranks)
    return max(0, min(share, entries - rank * share))


def filled(entries: int, multiple: int) -> int:
    """`entries`, rounded up to a multiple of `multiple`."""
    return -(-entries // multiple) * multiple


def _is_held(name: str, tied: bool, *, first: bool, last: bool) -> bool:
    """Whether a stage holds a parameter outside of blocks; a tied head is the embedding's weight."""
    if "embedding" in name:
        return first or (last and tied and name == "embedding.weight")
    return last


def _role(name: str) -> TensorRole:
    return next(role for pattern, role in TENSOR_PLAN.items() if fnmatchcase(name, pattern))
