"""What goes with what: the combinations of engine, model and layout that are refused before any process is started."""

from __future__ import annotations

from bigtrain.config import UserError
from bigtrain.engines.config import AccelerateConfig, DeepSpeedConfig, EngineConfig, FSDPConfig, Precision
from bigtrain.parallel.config import LayoutConfig

AXES = {
    "fsdp": ("dp_replicate", "dp_shard", "cp", "pp", "tp"),
    "deepspeed": ("dp_shard", "pp", "tp"),
    "accelerate": ("dp_shard",),
}
"""The axes of the mesh over which an engine takes more than one rank."""


def check_support(
    engine: EngineConfig,
    arch: str,
    layout: LayoutConfig,
    *,
    document_mask: bool,
    plain: bool = False,
    frozen: bool = False,
    precision: Precision = "bf16",
) -> None:
    """Refuse what an engine cannot do.

    Args:
        engine: The section `engine`.
        arch: `model.arch`.
        document_mask: `data.document_mask`.
        plain: Whether the model is a plain module of PyTorch (`models.plain`).
        frozen: Whether `optimizer.frozen` names parameters.
        precision: The key `precision`.

    Raises:
        UserError: An engine and a model that do not go together, a layout that the engine has not, document masks.
    """
    if (arch == "hf") != isinstance(engine, AccelerateConfig):
        fix = "Use engine: {name: accelerate}." if arch == "hf" else "Use engine: {name: fsdp} or {name: deepspeed}."
        raise UserError(f"A model of arch '{arch}' does not run on the engine '{engine.name}'", "engine.name", fix)
    _check_axes(engine.name, layout)
    _check_zero_bubble(engine, layout)
    if plain and not isinstance(engine, FSDPConfig):
        raise UserError(
            f"A plain module, as arch '{arch}' is, does not run on the engine '{engine.name}'",
            "engine.name",
            "Use engine: {name: fsdp}, or give the module the whole contract (bigtrain/models/contract.py).",
        )
    if frozen and not isinstance(engine, FSDPConfig):
        raise UserError(
            f"The engine '{engine.name}' trains all parameters: it lays them end to end, frozen ones too",
            "optimizer.frozen",
            "Use engine: {name: fsdp}, which freezes parameters at every layout.",
        )
    if precision == "fp16" and not isinstance(engine, FSDPConfig):
        raise UserError(
            f"FP16 is not run on the engine '{engine.name}': its loss scale would be kept in no checkpoint of ours",
            "precision",
            "Set precision to bf16, or use engine: {name: fsdp}.",
        )
    if isinstance(engine, DeepSpeedConfig) and layout.pp > 1:
        _check_pipeline(engine, layout)
    if isinstance(engine, AccelerateConfig) and document_mask:
        raise UserError(
            "A Hugging Face model takes no mask of documents: each model of transformers builds its own attention",
            "data.document_mask",
            "Set data.document_mask to false, or train one of our own models on the engine 'fsdp'.",
        )


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


def _check_axes(engine: str, layout: LayoutConfig) -> None:
    taken = AXES[engine]
    for axis in AXES["fsdp"]:
        size = getattr(layout, axis)
        if axis not in taken and size != 1:
            others = " or ".join(f"layout.{other}" for other in taken)
            raise UserError(
                f"layout.{axis} is {size}, and the engine '{engine}' takes more than one rank over {others} alone",
                f"layout.{axis}",
                f"Set layout.{axis} to 1, or train one of our own models on the engine 'fsdp'.",
            )


def _check_pipeline(engine: DeepSpeedConfig, layout: LayoutConfig) -> None:
    """DeepSpeed's pipeline engine reduces gradients once, at the end of a step, and knows one schedule."""
    if engine.zero > 1:
        raise UserError(
            f"DeepSpeed's pipeline takes ZeRO 0 and 1, not {engine.zero}: it reduces gradients at the end of a step, "
            "when ZeRO 2 and 3 have already spread them",
            "engine.zero",
            "Set engine.zero to 1, or layout.pp to 1, or use the engine 'fsdp'.",
        )
    if engine.offload != "none":
        raise UserError(
            "DeepSpeed's pipeline does not go with an optimizer on the CPU: the norm of the gradients would be summed "
            "over the stages group by group, and stages may have different groups",
            "engine.offload",
            "Set engine.offload to none, or layout.pp to 1.",
        )
    if layout.pp_schedule != "1f1b":
        raise UserError(
            f"DeepSpeed's pipeline runs the schedule 1f1b alone, not {layout.pp_schedule}",
            "layout.pp_schedule",
            "Set layout.pp_schedule to 1f1b and layout.pp_stages_per_rank to 1, or use the engine 'fsdp'.",
        )
