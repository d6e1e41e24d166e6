"""The `engine` section: who executes a step."""

from __future__ import annotations

from typing import Literal

from bigtrain.config import Section

Precision = Literal["fp32", "bf16"]
"""Arithmetic of the matmuls and the residual stream; parameters, reductions, norms and loss are FP32 in both."""


class EngineConfig(Section):
    """Who executes a step."""

    name: Literal["fsdp"] = "fsdp"
    """fsdp: PyTorch's FSDP2; one process runs without a process group."""

    deterministic: bool | Literal["auto"] = "auto"
    """Only kernels that give the same bits every time. auto: on a CPU, where it costs nothing; not on a GPU."""
