"""Collectives on single tensors, under names that work with every supported version of torch."""

from __future__ import annotations

import torch.distributed as dist

# torch 2.13 and later warn about the names that torch has up to 2.12.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_to_all = dist.all_to_all_single
