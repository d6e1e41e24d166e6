"""The share of tokens (or images) for which the correct class has the largest logit."""

from __future__ import annotations

from typing import ClassVar, Literal

from bigtrain.training.config import EVALUATORS, EvaluatorConfig


@EVALUATORS.register
class AccuracyConfig(EvaluatorConfig):
    """Accuracy of tokens or of classes. The model families record it with their loss, at every layout."""

    wants: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    name: Literal["accuracy"] = "accuracy"
