"""The part of the section `engine` that all engines share. Each engine has its own folder; see `EngineConfig`."""

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
"""Dtype of the matmuls and the residual stream. Parameters, reductions, norms and the loss are always FP32. fp16 uses
dynamic loss scaling."""


@dataclass(frozen=True)
class EngineParts:
    """The inputs for building an engine: sections of the config, the seed, and this process's ranks."""

    model: ModelConfig
    vocab_size: int
    """Number of outputs of the model: vocabulary entries, or classes."""
    optimizer: OptimizerConfig
    layout: LayoutConfig
    precision: Precision
    seed: int
    ranks: Ranks


class EngineConfig(Section):
    """Keys and properties that all engines share. The section of an engine adds its own keys and builds the engine.

    Each of bigtrain's engines has a folder: bigtrain/engines/NAME/config.py has the section, engine.py the engine.
    """

    axes: ClassVar[tuple[str, ...]] = ("dp_shard",)
    """Axes of the mesh on which the engine supports more than one rank."""
    runs_transformers: ClassVar[bool] = False
    """Whether the engine runs models of Hugging Face transformers, and only those; otherwise it runs native models."""
    runs_plain_modules: ClassVar[bool] = False
    """Whether the engine runs plain PyTorch modules (`models.plain`)."""
    freezes: ClassVar[bool] = False
    """Whether the engine can freeze parameters (`optimizer.frozen`)."""
    records_norms: ClassVar[bool] = False
    """Whether the engine records norms by group of parameters (`contract.RecordsNorms`)."""
    keeps_tensors: ClassVar[bool] = False
    """Whether the engine's `state` holds each parameter of the model by name, as one tensor or DTensor."""
    steps_parts: ClassVar[bool] = False
    """Whether the engine runs several optimizers in a step (`optimizer.parts`)."""
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16")
    """Values of `precision` that the engine supports."""

    name: str
    """Name of the engine: a folder of bigtrain/engines, or the name of a plugin's class."""

    deterministic: bool | Literal["auto", "across_layouts"] = "auto"
    """Whether only deterministic kernels are used. auto: true on a CPU, where it costs nothing; false on a GPU.
    across_layouts: as true, and a module whose random numbers depend on the layout is refused."""

    @property
    def flattens(self) -> bool:
        """Whether the engine flattens parameters into long vectors, so that the optimizer must work element-wise."""
        return False

    def check_layout(self, layout: LayoutConfig) -> None:
        """Refuse a layout that uses the engine's axes in a way that the engine does not support.

        Raises:
            UserError: The layout is not supported. The error names the key to change.
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
        """Build the engine on this rank, with the model's initial weights. Collective.

        Raises:
            UserError: The engine cannot run the model or the layout.
        """
        return self.make(EngineParts(model, vocab_size, optimizer, layout, precision, seed, ranks))

    def make(self, parts: EngineParts) -> Engine:
        """Create the engine that `build` returns; the section of each engine defines this method."""
        raise TypeError(f"{type(self).__name__} does not build its engine: define make()")


class Passthrough(EngineConfig):
    """The section of an engine that passes settings on to the library on which it is built."""

    passthrough: dict[str, Any] = Field(default_factory=dict)
    """Settings of the library that the engine is built on."""

    def read_passthrough(self, precision: Precision, *, pipelined: bool) -> None:
        """Let the library parse its settings. It is called in a separate process, which may import the library.

        Raises:
            UserError: The library refuses the settings.
        """
        raise TypeError(f"{type(self).__name__} does not read its passthrough: define read_passthrough()")


ENGINES = Registry("engine", EngineConfig, package="bigtrain.engines", folders=True, default="fsdp")
"""All engines by `engine.name`."""
