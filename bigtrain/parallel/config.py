"""The `layout` section: how the model and the batch lie on the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from pydantic import field_validator

from bigtrain.config import Count, Section


@dataclass(frozen=True)
class Mesh:
    """Sizes of the named axes of a job, outermost first; their product is the world size."""

    dp_replicate: int
    dp_shard: int

    @property
    def data_parallel(self) -> int:
        """Ranks that consume different sequences."""
        return self.dp_replicate * self.dp_shard


class LayoutConfig(Section):
    """How the model and the batch lie on the ranks."""

    dp_replicate: Annotated[Count, Ge(1)] = 1
    """Copies of the sharded model (HSDP above 1)."""

    dp_shard: Count = -1
    """Ranks that share one copy of parameters, gradients and optimizer; -1: all that are left."""

    micro_size: Annotated[Count, Ge(1)] | None = None
    """Sequences a rank takes in one pass, at most; null: its whole share of the batch."""

    @field_validator("dp_shard")
    @classmethod
    def _is_a_size(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError(f"{value} is no size: give a number of ranks, or -1 for all that are left")
        return value

    def mesh(self, world_size: int) -> Mesh:
        """The sizes of the axes on `world_size` ranks.

        Raises:
            ValueError: The axes do not multiply to the world size.
        """
        shard = world_size // self.dp_replicate if self.dp_shard == -1 else self.dp_shard
        if shard * self.dp_replicate != world_size:
            fits = [size for size in range(1, world_size + 1) if world_size % size == 0]
            raise ValueError(
                f"layout dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} does not make {world_size} ranks; "
                f"with dp_shard -1, dp_replicate may be {', '.join(map(str, fits))}"
            )
        return Mesh(self.dp_replicate, shard)
