"""The one place where an engine is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bigtrain.engines.config import AccelerateConfig, DeepSpeedConfig, EngineConfig, Precision
from bigtrain.models.config import ModelConfig
from bigtrain.optim.config import OptimizerConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks

if TYPE_CHECKING:
    from bigtrain.engines.accelerate import AccelerateEngine
    from bigtrain.engines.deepspeed import DeepSpeedEngine
    from bigtrain.engines.fsdp import FSDPEngine


def build_engine(
    model: ModelConfig,
    vocab_size: int,
    optimizer: OptimizerConfig,
    *,
    engine: EngineConfig,
    layout: LayoutConfig,
    precision: Precision,
    seed: int,
    ranks: Ranks,
) -> FSDPEngine | DeepSpeedEngine | AccelerateEngine:
    """The engine that `engine.name` asks for, with the model's initial weights.

    Raises:
        UserError: The engine cannot run this layout, or its passthrough is not DeepSpeed's.
    """
    # DeepSpeed is imported where it is asked for, and nowhere else: the import prints and takes a second.
    if isinstance(engine, DeepSpeedConfig):
        from bigtrain.engines.deepspeed_build import build_deepspeed_engine

        return build_deepspeed_engine(
            model, vocab_size, optimizer,
            engine=engine, layout=layout, precision=precision, seed=seed, ranks=ranks,
        )  # fmt: skip
    if isinstance(engine, AccelerateConfig):
        from bigtrain.engines.accelerate import AccelerateEngine

        return AccelerateEngine.build(
            model, vocab_size, optimizer,
            engine=engine, layout=layout, precision=precision, seed=seed, ranks=ranks,
        )  # fmt: skip
    from bigtrain.engines.fsdp import FSDPEngine

    return FSDPEngine.build(
        model, vocab_size, optimizer,
        engine=engine, layout=layout, precision=precision, seed=seed, ranks=ranks,
    )  # fmt: skip
