"""The section of the engine accelerate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bigtrain.engines.config import ENGINES, EngineParts, Passthrough, Precision

if TYPE_CHECKING:
    from bigtrain.engines.contract import Engine


@ENGINES.register
class AccelerateConfig(Passthrough):
    """Hugging Face models, trained through Accelerate's plugins."""

    runs_transformers: ClassVar[bool] = True
    freezes: ClassVar[bool] = True

    name: Literal["accelerate"] = "accelerate"
    """accelerate: models of `arch: hf`; a single process runs them in plain PyTorch."""

    strategy: Literal["ddp", "fsdp2", "zero2"] = "ddp"
    """What is sharded over the ranks. ddp: nothing; fsdp2: parameters, gradients and optimizer state; zero2: gradients
    and optimizer state."""

    passthrough: dict[str, Any] = Field(default_factory=dict)
    """Further settings of DistributedDataParallelKwargs (ddp), FullyShardedDataParallelPlugin (fsdp2) or DeepSpeed's
    zero_optimization (zero2)."""

    @property
    def flattens(self) -> bool:
        """See `EngineConfig.flattens`: true for zero2."""
        return self.strategy == "zero2"

    def read_passthrough(self, precision: Precision, *, pipelined: bool) -> None:
        """See `Passthrough.read_passthrough`."""
        import torch

        from bigtrain.engines.accelerate.strategies import plugins

        plugins(self, torch.device("cpu"), torch.float32)

    def make(self, parts: EngineParts) -> Engine:
        """See `EngineConfig.make`."""
        from bigtrain.engines.accelerate.engine import AccelerateEngine

        return AccelerateEngine.build(self, parts)
