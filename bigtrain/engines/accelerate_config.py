"""The `engine` section for Hugging Face models: one of Accelerate's ways to train in parallel."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from bigtrain.config import Section, UserError
from bigtrain.parallel.config import LayoutConfig

Strategy = Literal["ddp", "fsdp2", "zero2"]


class AccelerateConfig(Section):
    """Hugging Face models, through Accelerate's plugins."""

    name: Literal["accelerate"] = "accelerate"
    """accelerate: models of `arch: hf`; one process runs them in plain PyTorch."""

    strategy: Strategy = "ddp"
    """What the ranks share out. ddp: nothing; fsdp2: parameters, gradients, optimizer; zero2: gradients, optimizer."""

    deterministic: bool | Literal["auto"] = "auto"
    """Only kernels that give the same bits every time. auto: on a CPU, where it costs nothing; not on a GPU."""

    passthrough: dict[str, Any] = Field(default_factory=dict)
    """Further settings: of DistributedDataParallelKwargs (ddp), of FullyShardedDataParallelPlugin (fsdp2), or of
    DeepSpeed's zero_optimization (zero2)."""


def check_accelerate(engine: str, arch: str, layout: LayoutConfig, *, document_mask: bool) -> None:
    """Refuse what the accelerate engine cannot do, before any process is started.

    Args:
        engine: `engine.name`.
        arch: `model.arch`.
        document_mask: `data.document_mask`.

    Raises:
        UserError: An engine and a model that do not go together, another layout than data parallel, document masks.
    """
    if arch == "hf" and engine != "accelerate":
        raise UserError(
            f"A model of arch 'hf' does not run on the engine '{engine}'",
            "engine.name",
            "Use engine: {name: accelerate}.",
        )
    if engine != "accelerate":
        return
    if arch != "hf":
        raise UserError(
            f"The engine 'accelerate' runs models of arch 'hf', and this one is '{arch}'",
            "engine.name",
            "Use engine: {name: fsdp} or {name: deepspeed}.",
        )
    for axis in ("dp_replicate", "cp", "pp", "tp"):
        size = getattr(layout, axis, 1)
        if size != 1:
            raise UserError(
                f"layout.{axis} is {size}, and the engine 'accelerate' is data parallel alone",
                f"layout.{axis}",
                f"Set layout.{axis} to 1, or train one of our own models on the engine 'fsdp'.",
            )
    if document_mask:
        raise UserError(
            "A Hugging Face model takes no mask of documents: each model of transformers builds its own attention",
            "data.document_mask",
            "Set data.document_mask to false, or train one of our own models on the engine 'fsdp'.",
        )
