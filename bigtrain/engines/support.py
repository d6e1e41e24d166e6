"""What goes with what: the combinations of engine, model and layout that are refused before any process is started."""

from __future__ import annotations

from bigtrain.config import UserError
from bigtrain.parallel.config import LayoutConfig

LEFT_AT_ONE = {
    "deepspeed": ("dp_replicate", "cp"),
    "accelerate": ("dp_replicate", "cp", "pp", "tp"),
}
"""Axes that an engine has not got."""


def check_support(engine: str, arch: str, layout: LayoutConfig, *, document_mask: bool) -> None:
    """Refuse what an engine cannot do.

    Args:
        engine: `engine.name`.
        arch: `model.arch`.
        document_mask: `data.document_mask`.

    Raises:
        UserError: An engine and a model that do not go together, a layout that the engine has not, document masks.
    """
    if (arch == "hf") != (engine == "accelerate"):
        fix = "Use engine: {name: accelerate}." if arch == "hf" else "Use engine: {name: fsdp} or {name: deepspeed}."
        raise UserError(f"A model of arch '{arch}' does not run on the engine '{engine}'", "engine.name", fix)
    for axis in LEFT_AT_ONE.get(engine, ()):
        size = getattr(layout, axis)
        if size != 1:
            others = " and ".join(f"layout.{other}" for other in ("dp_shard", "tp", "pp") if other not in LEFT_AT_ONE[engine])
            raise UserError(
                f"layout.{axis} is {size}, which the engine '{engine}' has not got",
                f"layout.{axis}",
                f"Set layout.{axis} to 1: the ranks may go to {others}; or train one of our own models on the engine 'fsdp'.",
            )
    if engine == "accelerate" and document_mask:
        raise UserError(
            "A Hugging Face model takes no mask of documents: each model of transformers builds its own attention",
            "data.document_mask",
            "Set data.document_mask to false, or train one of our own models on the engine 'fsdp'.",
        )
