"""Norms of gradients, weights and updates, by group of parameters."""

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
    """Records gradient_norm/GROUP, weight_norm/GROUP and update_norm/GROUP, and the last two of all parameters.

    A row of metrics.jsonl shows those of the step before: they travel with the next step's all-reduce. Gradients are
    those of the mean loss, before clipping. Frozen parameters are not counted.
    """

    name: Literal["norms"] = "norms"
    every: Annotated[Count, Ge(1)] = 10
    """Steps between two records: rows of steps that this divides show them."""
    depth: Annotated[int, Ge(1)] = 1
    """Parts of a parameter's name that make its group: 1 "layers", 2 "layers.0"."""
    norms: Annotated[tuple[Literal["gradient", "weight", "update"], ...], MinLen(1)] = ("gradient", "weight", "update")
    """Which norms. An update's takes memory for a copy of the weights."""

    def check(self, engine: EngineConfig) -> None:
        """Refuse an engine that records none."""
        if not engine.records_norms:
            raise UserError(
                f"The engine '{engine.name}' records no norms by group of parameters",
                "callbacks",
                "Use engine: {name: fsdp}, or remove the callback 'norms'.",
            )

    def build(self, context: CallbackContext) -> Callback:
        """On each rank for its own parts."""
        return _Norms(self, context)


class _Norms(Callback):
    def __init__(self, config: NormsConfig, context: CallbackContext) -> None:
        self._config, self._context = config, context

    def on_start(self, progress: Any) -> None:
        from bigtrain.engines.contract import RecordsNorms

        engine, config = self._context.engine, self._config
        assert isinstance(engine, RecordsNorms), "check() refuses other engines"
        engine.record_norms(config.every, config.depth, config.norms)
