"""Accuracy on tasks, whose requests are a context and its continuations, scored by log-likelihood."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import MinLen
from pydantic import field_validator

from bigtrain.config import UserError
from bigtrain.config.urls import is_url
from bigtrain.training.config import EVALUATORS, EvaluatorConfig, OwnPass, PassContext, Result
from bigtrain.training.requests import read_requests
from bigtrain.training.tasks import Scorer

if TYPE_CHECKING:
    from bigtrain.data.index import ShardIndex

UNITS = {"bits_per_byte": "bits per byte"}


@EVALUATORS.register
class TasksConfig(EvaluatorConfig):
    """Scores the requests of files, and reports `val_task/NAME/accuracy` and similar metrics for each task."""

    name: Literal["tasks"] = "tasks"
    files: Annotated[tuple[str, ...], MinLen(1)]
    """Files of requests, one JSON object per line (`bigtrain.training.tasks`); every node reads them at these paths."""

    @field_validator("files")
    @classmethod
    def _are_absolute(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        for file in files:
            if is_url(file):
                raise ValueError(f"'{file}' is a URL: name a file of this machine")
        return tuple(os.path.abspath(file) for file in files)

    def check(self, data: ShardIndex) -> None:
        """Refuse data without a tokenizer, and files that hold no valid requests."""
        if data.tokenizer is None or data.tokenizer.kind == "unknown":
            raise UserError(
                "The evaluator 'tasks' encodes text, but the training data has no tokenizer",
                data.place,
                "Remove it, or train on shards that hold one.",
            )
        for file in self.files:
            read_requests(Path(file))

    def own_pass(self, context: PassContext) -> OwnPass:
        """A pass that scores all requests, each once over all ranks; see `EvaluatorConfig.own_pass`."""
        requests = [request for file in self.files for request in read_requests(Path(file))]
        scorer = Scorer(requests, context.load_tokenizer())

        def run() -> dict[str, Result]:
            return {
                f"task/{task}/{measure}": Result(value, UNITS.get(measure, ""))
                for task, found in scorer.score(context).items()
                for measure, value in found.items()
                if measure != "requests"
            }

        return run
