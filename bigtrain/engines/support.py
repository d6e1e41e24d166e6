"""What goes with what: the combinations of engine, model and layout that are refused before any process is started."""

from __future__ import annotations

from bigtrain.config import UserError
from bigtrain.parallel.config import LayoutConfig

DATA_PARALLEL_ALONE = ("dp_replicate", "cp", "pp", "tp")
"""Axes that deepspeed and accelerate leave at 1."""


def check_support(engine: str, arch: str, layout: LayoutConfig, *, document_mask: bool, plain: bool = False) -> None:
    """Refuse what an engine cannot do.

    Args:
        engine: `engine.name`.
        arch: `model.arch`.
        document_mask: `data.document_mask`.
        plain: Whether the model is a plain module of PyTorch (`models.plain`).

    Raises:
        UserError: An engine and a model that do not go together, a layout that the engine has not, document masks.
    """
    if (arch == "hf") != (engine == "accelerate"):
        fix = "Use engine: {name: accelerate}." if arch == "hf" else "Use engine: {name: fsdp} or {name: deepspeed}."
        raise UserError(f"A model of arch '{arch}' does not run on the engine '{engine}'", "engine.name", fix)
    if plain and engine != "fsdp":
        raise UserError(
            f"A plain module, as arch '{arch}' is, does not run on the engine '{engine}'",
            "engine.name",
            "Use engine: {name: fsdp}, or give the module the whole contract (bigtrain/models/contract.py).",
        )
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
