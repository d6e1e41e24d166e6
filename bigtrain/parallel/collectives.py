"""Collectives over whole tensors, by the names that every supported torch has."""

from __future__ import annotations

import torch.distributed as dist

# Their names up to torch 2.12 give a warning from 2.13 on.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_to_all = dist.all_to_all_single
