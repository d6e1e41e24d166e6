"""The section of the engine fsdp."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from bigtrain.config import UserError
from bigtrain.engines.config import ENGINES, EngineConfig, EngineParts, Precision
from bigtrain.parallel.config import LayoutConfig, Recompute

if TYPE_CHECKING:
    from bigtrain.engines.contract import Engine


@ENGINES.register
class FSDPConfig(EngineConfig):
    """PyTorch's FSDP2; a single process runs plain PyTorch without a process group."""

    axes: ClassVar[tuple[str, ...]] = ("dp_replicate", "dp_shard", "cp", "pp", "tp")
    runs_plain_modules: ClassVar[bool] = True
    freezes: ClassVar[bool] = True
    records_norms: ClassVar[bool] = True
    keeps_tensors: ClassVar[bool] = True
    steps_parts: ClassVar[bool] = True
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16", "fp16")

    name: Literal["fsdp"] = "fsdp"

    recompute: Recompute = "none"
    """Activations that the backward pass recomputes. full: all of each block, from its input. selective: all but
    matmuls, attention and what ranks exchange."""

    compile: bool = False
    """Whether each block is compiled (torch.compile); all blocks share the compiled code."""

    def check_layout(self, layout: LayoutConfig) -> None:
        """Refuse zero_bubble with recompute or compile: its backward pass runs twice, for inputs and for weights.

        Raises:
            UserError: `layout.pp_schedule` is zero_bubble, and `recompute` or `compile` is set.
        """
        if layout.pp == 1 or layout.pp_schedule != "zero_bubble":
            return
        if self.recompute != "none" or self.compile:
            key = "compile" if self.compile else "recompute"
            why = (
                "does not support compiled blocks"
                if self.compile
                else "would compute each block three times with recomputation"
            )
            off = "false" if self.compile else "none"
            raise UserError(
                f"layout.pp_schedule zero_bubble {why}",
                f"engine.{key}",
                f"Set engine.{key} to {off}, or layout.pp_schedule to 1f1b or interleaved.",
            )

    def make(self, parts: EngineParts) -> Engine:
        """See `EngineConfig.make`."""
        from bigtrain.engines.fsdp.engine import FSDPEngine

        return FSDPEngine.build(self, parts)
