"""Evaluation on held-out data: all evaluators share one pass over each held-out set.

The pass reads a set in global batches that are the same at every evaluation. The engine sums losses, weights and
recorded metrics over all ranks. Evaluators turn the sums into results, for each set and for all sets together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from bigtrain.engines.contract import Engine, Measuring, Totals
from bigtrain.metrics import merge
from bigtrain.training.config import EvaluatorConfig, HeldOut, OwnPass, PassContext, Result

if TYPE_CHECKING:
    from bigtrain.data.index import ShardIndex
    from bigtrain.models.config import ModelConfig

PREFIX = "val_"
"""Prefix of the names of held-out metrics. If there are several sets, the metrics of one set end with `/SET`."""


@dataclass
class Evaluated:
    """Results of one evaluation, by their names in metrics.jsonl; None if no token or sample counts."""

    values: dict[str, float | None] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)


class Evaluation:
    """The evaluators of a run, and the held-out sets on which they run.

    Args:
        engine: The engine that runs the passes.
        evaluators: The evaluators from the config.
        sets: The held-out sets by name.
        warn: Receives a warning line, at most once per missing metric.
        context: The context of the evaluators' own passes; None: own passes are not run.
    """

    def __init__(
        self,
        engine: Engine,
        evaluators: Sequence[EvaluatorConfig],
        sets: Mapping[str, HeldOutSet],
        warn: Callable[[str], None],
        context: PassContext | None = None,
    ) -> None:
        self._engine = engine
        self._evaluators = evaluators
        self._sets = sets
        self._warn = warn
        self._warned: set[str] = set()
        own = [one.measure for one in evaluators if type(one).measure is not EvaluatorConfig.measure]
        wanted: frozenset[str] = frozenset().union(*(one.wants for one in evaluators))
        self._measuring = Measuring(wanted, tuple(own))
        opened = [] if context is None else [evaluator.own_pass(context) for evaluator in evaluators]
        self._own_passes: list[OwnPass] = [one for one in opened if one is not None]

    def run(self) -> Evaluated:
        """Evaluate on all sets, then run the evaluators' own passes. Collective."""
        found = {name: self._of_set(held_out) for name, held_out in self._sets.items()}
        evaluated = Evaluated()
        if len(found) > 1:
            for name, totals in found.items():
                self._add(evaluated, totals, f"/{name}")
        if found:
            self._add(evaluated, together(found.values()), "")
        for own_pass in self._own_passes:
            self._put(evaluated, own_pass(), "")
        return evaluated

    def _of_set(self, held_out: HeldOutSet) -> HeldOut:
        with held_out.open() as loader:
            totals = self._engine.evaluate((batch.micro_batches for batch in loader), self._measuring)
        per_token = held_out.bytes_per_token
        text_bytes = totals.weight * (math.nan if per_token is None else per_token)
        return HeldOut(totals, text_bytes, held_out.loss_unit)

    def _add(self, evaluated: Evaluated, held_out: HeldOut, suffix: str) -> None:
        """Add the recorded metrics and the evaluators' results; a result replaces a metric of the same name."""
        recorded = held_out.totals.metrics
        results = {name: Result(value.result, value.metric.unit) for name, value in recorded.items()}
        for evaluator in self._evaluators:
            for name in sorted(evaluator.wants - recorded.keys() - self._warned):
                self._warned.add(name)
                self._warn(
                    f"the evaluator '{evaluator.name}' needs the metric '{name}', which this model does not record"
                )
            results |= evaluator.results(held_out)
        self._put(evaluated, results, suffix)

    def _put(self, evaluated: Evaluated, results: Mapping[str, Result], suffix: str) -> None:
        for name, result in results.items():
            key = f"{PREFIX}{name}{suffix}"
            evaluated.values[key] = result.value
            if result.unit:
                evaluated.units[key] = result.unit


@dataclass(frozen=True)
class HeldOutSet:
    """One set of held-out data."""

    open: Callable[[], Any]
    """Opens a context manager that yields an evaluation's global batches, each with this rank's `micro_batches`."""
    bytes_per_token: float | None = None
    """Mean bytes of text per token; None for data other than text."""
    loss_unit: str = ""
    """Unit of the model's loss."""

    @classmethod
    def of(cls, open_one: Callable[[ShardIndex], Any], index: ShardIndex, model: ModelConfig) -> HeldOutSet:
        """Build the held-out set of one shard directory, for a model.

        Args:
            open_one: Opens the set's batches; see `open`.
        """
        bytes_per_token = index.bytes_per_token if model.predicts_text else None
        return cls(partial(open_one, index), bytes_per_token, model.metric_units()["val_loss"])


def together(sets: Iterable[HeldOut]) -> HeldOut:
    """The sums over several sets."""
    loss = weight = text_bytes = 0.0
    unit = ""
    metrics: dict[str, Any] = {}
    for held_out in sets:
        loss, weight = loss + held_out.totals.loss, weight + held_out.totals.weight
        text_bytes, unit = text_bytes + held_out.text_bytes, held_out.loss_unit
        merge(metrics, held_out.totals.metrics)
    return HeldOut(Totals(loss, weight, metrics), text_bytes, unit)
