"""Checks that the engine supports the model, the optimizer and the layout, before any process is started."""

from __future__ import annotations

from collections.abc import Collection

from bigtrain.config import UserError
from bigtrain.engines.config import ENGINES, EngineConfig, Precision
from bigtrain.models.config import FAMILIES
from bigtrain.optim.config import OptimizerConfig
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig


def check_support(
    engine: EngineConfig,
    arch: str,
    layout: LayoutConfig,
    *,
    document_mask: bool = False,
    optimizer: OptimizerConfig | None = None,
    precision: Precision = "bf16",
    frozen: Collection[str] = (),
) -> None:
    """Refuse a combination that the engine does not support.

    Args:
        engine: The section `engine`.
        arch: `model.arch`.
        layout: The section `layout`.
        document_mask: `data.document_mask`.
        optimizer: The section `optimizer`; None: AdamW with no frozen parameters.
        precision: The key `precision`.
        frozen: Patterns of the parameters that the model itself freezes (`ModelConfig.frozen`): all but its adapter.

    Raises:
        UserError: The engine does not support the model, its document mask, the layout, the optimizer, frozen
            parameters or the precision.
    """
    optimizer = optimizer or AdamWConfig()
    _check_model(engine, arch, document_mask)
    _check_axes(engine, layout)
    engine.check_layout(layout)
    if (optimizer.frozen or frozen) and not engine.freezes:
        raise UserError(
            f"The engine '{engine.name}' cannot freeze parameters: it flattens all of them, including frozen ones",
            "optimizer.frozen" if optimizer.frozen else "model.adapter",
            "Use engine: {name: fsdp}, which freezes parameters at every layout.",
        )
    _check_parts(engine, arch, optimizer, precision)
    if not optimizer.elementwise and engine.flattens:
        raise UserError(
            f"The engine '{engine.name}' flattens the parameters here, but the optimizer '{optimizer.name}' needs "
            "their shapes",
            "optimizer.name",
            "Use engine: {name: fsdp}, or an optimizer that works element by element.",
        )
    if optimizer.clip is not None and optimizer.clip.by_parameter and not engine.keeps_tensors:
        raise UserError(
            f"The engine '{engine.name}' flattens or splits the parameters, but clipping '{optimizer.clip.name}' needs "
            "their shapes",
            "optimizer.clip",
            "Use engine: {name: fsdp}, or another clipping, such as clip: 1.0.",
        )
    if precision not in engine.precisions:
        raise UserError(
            f"The engine '{engine.name}' does not support {precision.upper()}: its checkpoints would not hold the "
            "loss scale",
            "precision",
            "Set precision to bf16, or use engine: {name: fsdp}.",
        )


def _check_model(engine: EngineConfig, arch: str, document_mask: bool) -> None:
    family = FAMILIES[arch]
    if family.keeps_contract == engine.runs_transformers:
        fitting = [name for name in ENGINES if ENGINES[name].runs_transformers != family.keeps_contract]
        raise UserError(
            f"A model of arch '{arch}' does not run on the engine '{engine.name}'",
            "engine.name",
            f"Use engine: {' or '.join(f'{{name: {name}}}' for name in fitting)}.",
        )
    if family.is_plain and not engine.runs_plain_modules:
        raise UserError(
            f"A plain module, as arch '{arch}' is, does not run on the engine '{engine.name}'",
            "engine.name",
            f"Use engine: {_names('runs_plain_modules')}, or give the module the full contract "
            "(bigtrain/models/contract.py).",
        )
    if engine.runs_transformers and document_mask:
        raise UserError(
            "A Hugging Face model does not support a document mask: each model of transformers builds its own "
            "attention",
            "data.document_mask",
            "Set data.document_mask to false, or train a native model on the engine 'fsdp'.",
        )


def _check_parts(engine: EngineConfig, arch: str, optimizer: OptimizerConfig, precision: Precision) -> None:
    """Refuse a model of several parts if `optimizer.parts` names other parts, or the engine has only one optimizer."""
    wanted = FAMILIES[arch].parts
    if not wanted and not optimizer.parts:
        return
    if not engine.steps_parts:
        raise UserError(
            f"The engine '{engine.name}' has one optimizer, but a model of arch '{arch}' has the parts "
            f"{', '.join(wanted or optimizer.parts)}",
            "engine.name",
            f"Use engine: {_names('steps_parts')}.",
        )
    if set(wanted) != set(optimizer.parts):
        raise UserError(
            f"optimizer.parts has {', '.join(optimizer.parts) or 'nothing'}, but a model of arch '{arch}' has "
            + (f"the parts {', '.join(wanted)}" if wanted else "no parts"),
            "optimizer.parts",
            "Write optimizer.parts: {" + ", ".join(f"{name}: {{}}" for name in wanted) + "}."
            if wanted
            else "Remove it, or name the model's parts in its Config.",
        )
    if optimizer.parts[wanted[0]].every != 1:
        raise UserError(
            f"The first part, '{wanted[0]}', is not updated in every step",
            f"optimizer.parts.{wanted[0]}.every",
            "Set it to 1; other parts may be updated more rarely.",
        )
    if precision == "fp16":
        raise UserError(
            "FP16 has one loss scale, but each part of a model has its own loss",
            "precision",
            "Set precision to bf16 or fp32.",
        )


def _names(quality: str) -> str:
    """The engines whose class variable `quality` is true, as YAML."""
    return " or ".join(f"{{name: {name}}}" for name in ENGINES if getattr(ENGINES[name], quality))


def _check_axes(engine: EngineConfig, layout: LayoutConfig) -> None:
    for axis in ENGINES["fsdp"].axes:
        size = getattr(layout, axis)
        if axis not in engine.axes and size != 1:
            others = " or ".join(f"layout.{other}" for other in engine.axes)
            raise UserError(
                f"layout.{axis} is {size}, but the engine '{engine.name}' supports more than one rank only over "
                f"{others}",
                f"layout.{axis}",
                f"Set layout.{axis} to 1, or train a native model on the engine 'fsdp'.",
            )
