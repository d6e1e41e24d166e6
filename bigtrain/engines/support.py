"""What goes with what: the combinations of engine, model and layout that are refused before any process is started."""

from __future__ import annotations

from bigtrain.config import UserError
from bigtrain.engines.config import EngineConfig, FSDPConfig
from bigtrain.parallel.config import LayoutConfig

DATA_PARALLEL_ALONE = ("dp_replicate", "cp", "pp", "tp")
"""Axes that deepspeed and accelerate leave at 1."""


def check_support(engine: EngineConfig, arch: str, layout: LayoutConfig, *, document_mask: bool) -> None:
    """Refuse what an engine cannot do.

    Args:
        engine: The section `engine`.
        arch: `model.arch`.
        document_mask: `data.document_mask`.

    Raises:
        UserError: An engine and a model that do not go together, a layout that the engine has not, document masks.
    """
    _check_zero_bubble(engine, layout)
    _check_engine(engine.name, arch, layout, document_mask)


def _check_zero_bubble(engine: EngineConfig, layout: LayoutConfig) -> None:
    """It walks through a block twice, for the gradients of its input and of its weights."""
    if not isinstance(engine, FSDPConfig) or layout.pp == 1 or layout.pp_schedule != "zero_bubble":
        return
    if engine.recompute != "none" or engine.compile:
        key = "compile" if engine.compile else "recompute"
        why = "takes no compiled block" if engine.compile else "would compute each block three times"
        off = "false" if engine.compile else "none"
        raise UserError(
            f"layout.pp_schedule zero_bubble {why}",
            f"engine.{key}",
            f"Set engine.{key} to {off}, or layout.pp_schedule to 1f1b or interleaved.",
        )


def _check_engine(engine: str, arch: str, layout: LayoutConfig, document_mask: bool) -> None:
    if (arch == "hf") != (engine == "accelerate"):
        fix = "Use engine: {name: accelerate}." if arch == "hf" else "Use engine: {name: fsdp} or {name: deepspeed}."
        raise UserError(f"A model of arch '{arch}' does not run on the engine '{engine}'", "engine.name", fix)
    if engine != "fsdp":
        for axis in DATA_PARALLEL_ALONE:
            size = getattr(layout, axis)
            if size != 1:
                raise UserError(
                    f"layout.{axis} is {size}, and the engine '{engine}' is data parallel alone",
                    f"layout.{axis}",
                    f"Set layout.{axis} to 1, or train one of our own models on the engine 'fsdp'.",
                )
    if engine == "accelerate" and document_mask:
        raise UserError(
            "A Hugging Face model takes no mask of documents: each model of transformers builds its own attention",
            "data.document_mask",
            "Set data.document_mask to false, or train one of our own models on the engine 'fsdp'.",
        )
