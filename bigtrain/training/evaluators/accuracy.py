"""The share of tokens (or images) whose right answer has the largest logit."""

from __future__ import annotations

from typing import ClassVar, Literal

from bigtrain.training.config import EVALUATORS, EvaluatorConfig


@EVALUATORS.register
class AccuracyConfig(EvaluatorConfig):
    """Accuracy of tokens, or of classes; the families' loss records it at every layout."""

    wants: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    name: Literal["accuracy"] = "accuracy"
