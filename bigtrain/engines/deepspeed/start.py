"""Importing DeepSpeed without its side effects: it prints, picks a device by itself and compiles while it starts."""

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
    """DeepSpeed for a device, quiet below warnings, with nothing left for it to compile.

    On a CPU it would compile an all-reduce over shared memory, which only its inference calls: that takes a minute,
    needs a C++ compiler, and leaves a lock behind when it is killed, on which every later start would wait forever.
    What we ask of it needs no extension, as the optimizers are torch's own; so none is offered.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its first lines come before its logger can be reached.
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    import deepspeed

    # It calls collectives by the names that they had up to torch 2.12, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It would be filled on first use, by running compilers.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def join_process_group(deepspeed: ModuleType, ranks: Ranks, device: torch.device) -> None:
    """Join the default group, which DeepSpeed needs in one process too, and let DeepSpeed use it."""
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
    """Leave the default group, and make DeepSpeed forget it and what it has numbered.

    Its numbers of modules and parameters must agree on all ranks, and go on counting in a process that starts another
    engine, perhaps with ranks of another past.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    deepspeed.zero.Init.param_id = 0
    (counter,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0] = 0
