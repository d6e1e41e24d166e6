"""Imports DeepSpeed without its side effects: it prints, selects a device by itself and compiles while it starts."""

from __future__ import annotations

import logging
import os
import warnings
from types import ModuleType

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from bigtrain.parallel.mesh import START_TIMEOUT, Ranks


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for a device, with logging at level WARNING and without its compiled extensions.

    On a CPU DeepSpeed would compile an all-reduce over shared memory, which only its inference uses. That takes a
    minute and needs a C++ compiler. If it is killed, it leaves a lock file on which every later start waits forever.
    Training with torch's own optimizers needs no extension, so DeepSpeed's list of extensions is emptied.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed logs its first lines during the import, before its logger can be configured.
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed

    # DeepSpeed calls collectives in every step by their names up to torch 2.12, which are deprecated since.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would fill this dictionary on first use, by running compilers.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def join_process_group(deepspeed: ModuleType, ranks: Ranks, device: torch.device) -> None:
    """Join the default process group, which DeepSpeed needs even with one process, and let DeepSpeed use it."""
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = HashStore() if ranks.world_size == 1 else None
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=START_TIMEOUT
        )
    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False, timeout=START_TIMEOUT
    )


def leave_process_group(deepspeed: ModuleType) -> None:
    """Leave the default process group, and reset DeepSpeed's reference to it and its counters.

    DeepSpeed numbers modules and parameters with counters that never restart in a process. The numbers must agree on
    all ranks, also if the next engine of this process runs with ranks that have started other engines before.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    deepspeed.zero.Init.param_id = 0
    (counter,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0] = 0
