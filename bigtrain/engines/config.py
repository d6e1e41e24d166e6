"""The section `engine` as all engines share it. An engine is one folder; see `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from bigtrain.config import Registry, Section

if TYPE_CHECKING:
    from bigtrain.engines.contract import Engine
    from bigtrain.models.config import ModelConfig
    from bigtrain.optim.config import OptimizerConfig
    from bigtrain.parallel.config import LayoutConfig
    from bigtrain.parallel.mesh import Ranks

Precision = Literal["fp32", "bf16", "fp16"]
"""Arithmetic of the matmuls and the residual stream; parameters, reductions, norms and loss are FP32 in all. fp16 comes
with a loss scale that follows what overflows."""


@dataclass(frozen=True)
class EngineParts:
    """What an engine is built from: sections of the config, and this rank's place."""

    model: ModelConfig
    vocab_size: int
    """Outputs of the model: entries of the vocabulary, or classes."""
    optimizer: OptimizerConfig
    layout: LayoutConfig
    precision: Precision
    seed: int
    ranks: Ranks


class EngineConfig(Section):
    """What all engines share. An engine adds its keys, says what it runs, and builds itself.

    bigtrain's own lie one folder each: bigtrain/engines/NAME/config.py has the section, engine.py the engine.
    """

    axes: ClassVar[tuple[str, ...]] = ("dp_shard",)
    """The axes of the mesh over which it takes more than one rank."""
    runs_transformers: ClassVar[bool] = False
    """Whether it runs models of Hugging Face transformers, and no others; otherwise it runs native models alone."""
    runs_plain_modules: ClassVar[bool] = False
    """Whether it runs plain modules of PyTorch (`models.plain`)."""
    freezes: ClassVar[bool] = False
    """Whether it can leave parameters as they are (`optimizer.frozen`), where it does not lay them end to end."""
    records_norms: ClassVar[bool] = False
    """Whether it records norms by group of parameters (`contract.RecordsNorms`)."""
    keeps_tensors: ClassVar[bool] = False
    """Whether its `state` holds each parameter of the model by name, as one tensor or DTensor."""
    steps_parts: ClassVar[bool] = False
    """Whether it runs several optimizers in a step (`optimizer.parts`)."""
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16")
    """What `precision` may be."""

    name: str
    """Which engine: a folder of bigtrain/engines, or the name of a plugin's class."""

    deterministic: bool | Literal["auto", "across_layouts"] = "auto"
    """Only kernels that give the same bits every time. auto: on a CPU, where it costs nothing; not on a GPU.
    across_layouts: as true, and a module whose random draws differ from layout to layout is refused."""

    @property
    def flattens(self) -> bool:
        """Whether it lays parameters end to end, so that the optimizer must work element by element."""
        return False

    def check_layout(self, layout: LayoutConfig) -> None:
        """Refuse a layout that the engine does not run on its axes.

        Raises:
            UserError: With the key to change.
        """

    def build(
        self,
        model: ModelConfig,
        vocab_size: int,
        optimizer: OptimizerConfig,
        *,
        layout: LayoutConfig,
        precision: Precision,
        seed: int,
        ranks: Ranks,
    ) -> Engine:
        """The engine on this rank, with the model's initial weights. All ranks build it together.

        Raises:
            UserError: It cannot run the model or the layout.
        """
        return self.make(EngineParts(model, vocab_size, optimizer, layout, precision, seed, ranks))

    def make(self, parts: EngineParts) -> Engine:
        """What `build` returns; an engine's section defines it."""
        raise TypeError(f"{type(self).__name__} does not build its engine: define make()")


class Passthrough(EngineConfig):
    """An engine that takes settings of the library below it."""

    passthrough: dict[str, Any] = Field(default_factory=dict)
    """Settings of the library that the engine is built on."""

    def read_passthrough(self, precision: Precision, *, pipelined: bool) -> None:
        """Let the library read its settings; called in a process of its own, which may import it.

        Raises:
            UserError: It refuses them.
        """
        raise TypeError(f"{type(self).__name__} does not read its passthrough: define read_passthrough()")


ENGINES = Registry("engine", EngineConfig, package="bigtrain.engines", folders=True, default="fsdp")
"""All engines by `engine.name`."""
