"""Records norms of gradients, weights and updates by group of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, MinLen

from bigtrain.config import Count, UserError
from bigtrain.training.callback import Callback, CallbackContext
from bigtrain.training.config import CALLBACKS, CallbackConfig

if TYPE_CHECKING:
    from bigtrain.engines.config import EngineConfig


@CALLBACKS.register
class NormsConfig(CallbackConfig):
    """Records gradient_norm/GROUP, weight_norm/GROUP, update_norm/GROUP; and weight_norm, update_norm over all groups.

    A row of metrics.jsonl shows the norms of the step before, because the next step's all-reduce carries them.
    Gradients are those of the mean loss, before clipping. Frozen parameters are not counted.
    """

    name: Literal["norms"] = "norms"
    every: Annotated[Count, Ge(1)] = 10
    """Number of steps between two records. Rows of steps that are divisible by this number show the norms."""
    depth: Annotated[int, Ge(1)] = 1
    """Number of parts of a parameter's name that form its group: 1 gives "layers", 2 gives "layers.0"."""
    norms: Annotated[tuple[Literal["gradient", "weight", "update"], ...], MinLen(1)] = ("gradient", "weight", "update")
    """Which norms to record. The norm of updates needs memory for a copy of the weights."""

    def check(self, engine: EngineConfig) -> None:
        """Refuse an engine that records no norms."""
        if not engine.records_norms:
            raise UserError(
                f"The engine '{engine.name}' records no norms by group of parameters",
                "callbacks",
                "Use engine: {name: fsdp}, or remove the callback 'norms'.",
            )

    def build(self, context: CallbackContext) -> Callback:
        """Build this rank's callback, which covers the rank's own shards of the parameters."""
        return _Norms(self, context)


class _Norms(Callback):
    def __init__(self, config: NormsConfig, context: CallbackContext) -> None:
        self._config, self._context = config, context

    def on_start(self, progress: Any) -> None:
        from bigtrain.engines.contract import RecordsNorms

        engine, config = self._context.engine, self._config
        assert isinstance(engine, RecordsNorms), "check() refuses other engines"
        engine.record_norms(config.every, config.depth, config.norms)
