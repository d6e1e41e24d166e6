"""Which part of each parameter lies on a rank: shapes and sizes, without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bigtrain.models.config import TensorRole
from bigtrain.models.decoder_config import TENSOR_PLAN, DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh


@dataclass(frozen=True)
class Parameter:
    """A parameter as tp leaves it on a rank, and its share among the ranks that shard it."""

    name: str
    role: TensorRole
    shape: tuple[int, ...]
    """Of the part that lies on this rank's tp coordinate."""
    shard_dim: int
    """The dimension that is sharded (ZeRO-3): rows, or columns where tp has split rows into unequal parts."""
    own_share: int
    """Entries of that dimension on this rank."""

    @property
    def elements(self) -> int:
        """Of the part."""
        return math.prod(self.shape)

    @property
    def own_elements(self) -> int:
        """Of this rank's shard."""
        return self.elements // self.shape[self.shard_dim] * self.own_share

    def padded_elements(self, shards: int) -> int:
        """Of the part, filled up so that the shards are of one size."""
        entries = self.shape[self.shard_dim]
        return self.elements // entries * (-(-entries // shards) * shards)


@dataclass(frozen=True)
class Parts:
    """The parameters of one rank, in the groups that are gathered together."""

    root: list[Parameter]
    """What is in no block: embedding, last norm, head."""
    blocks: list[tuple[str, list[Parameter]]]
    partial: list[Parameter]
    """Whole over tp, yet met only a part of the activations: their gradients are summed over tp."""
    shards: int
    """Ranks that share each parameter."""

    @classmethod
    def of(cls, model: DecoderConfig, vocab_size: int, sizes: Mesh, layout: LayoutConfig, rank: int) -> Parts:
        """The parts of a rank."""
        place = sizes.coordinates(rank)
        shards, own = sizes.dp_shard * sizes.cp, place["dp_shard"] * sizes.cp + place["cp"]
        root: list[Parameter] = []
        blocks: dict[str, list[Parameter]] = {f"layers.{block}": [] for block in range(model.layers)}
        for name, shape in model.parameter_shapes(vocab_size).items():
            role = _role(name)
            dim = SPLIT_DIM.get(role)
            shard_dim = 0
            if dim is not None:
                if dim == 0 and shape[0] % sizes.tp:
                    shard_dim = 1
                part = chunk(shape[dim], sizes.tp, place["tp"])
                shape = (*shape[:dim], part, *shape[dim + 1 :])
            share = chunk(shape[shard_dim], shards, own)
            parameter = Parameter(name, role, shape, shard_dim, share)
            block = ".".join(name.split(".")[:2])
            blocks.get(block, root).append(parameter)
        everything = [*root, *(parameter for block in blocks.values() for parameter in block)]
        met_a_part = {"heads", "sequence"} if layout.sequence_parallel else {"heads"}
        partial = [parameter for parameter in everything if parameter.role in met_a_part]
        return cls(root, list(blocks.items()), partial if sizes.tp > 1 else [], shards)


SPLIT_DIM: dict[TensorRole, int] = {"column": 0, "vocab": 0, "row": 1}


def chunk(entries: int, ranks: int, rank: int) -> int:
    """How many of `entries` a rank has: each as many as the first, but for the last ranks (`torch.chunk`)."""
    share = -(-entries // ranks)
    return max(0, min(share, entries - rank * share))


def _role(name: str) -> TensorRole:
    return next(role for pattern, role in TENSOR_PLAN.items() if fnmatchcase(name, pattern))
