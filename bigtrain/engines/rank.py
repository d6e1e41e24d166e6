"""Functions that all engines use on their own rank: determinism, seeds, copies to the device, peak memory."""

from __future__ import annotations

import hashlib
import os
import random
import resource

import numpy as np
import torch
from torch import Tensor

from bigtrain.engines.config import EngineConfig, Precision
from bigtrain.engines.contract import MicroBatch

COMPUTE_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Dtype of matmuls and residual stream."""


def set_determinism(engine: EngineConfig, device: torch.device) -> None:
    """Select kernels with bitwise reproducible results if `engine.deterministic` requests them."""
    wanted = device.type == "cpu" if engine.deterministic == "auto" else bool(engine.deterministic)
    if wanted and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Filling new memory costs time, and only helps code that reads uninitialised memory, which bigtrain does not.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def reseed(seed: int, place: object) -> None:
    """Seed the generators of torch, NumPy and `random` from the run's seed and a label, equally on all ranks.

    A checkpoint therefore needs no generator state.

    Args:
        place: The label: the step, or another value for which separate random numbers are wanted.
    """
    digest = hashlib.blake2b(f"{seed}/{place}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little") >> 1
    # Without an accelerator `torch.manual_seed` keeps a formatted stack for each kind of one, at every call.
    seed_torch = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed_torch(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def to_device(arrays: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch as tensors on a device; the copy to a GPU is asynchronous."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if device.type == "cpu":
        return tensors
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank in bytes: of its GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
