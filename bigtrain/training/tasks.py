"""Scores requests of a context and continuations by the log-likelihood of each continuation.

A file holds one request per line, as JSON:

    {"context": "The capital of France is", "continuations": [" Paris", " Rome"], "gold": 0, "task": "capitals"}

Texts are tokenized as in lm-evaluation-harness: context and continuation are encoded together, spaces at the end of the
context move to the continuation, and a context that is too long loses its beginning. Every sequence is a separate
source in the engine's sums, so each is scored exactly once at every layout.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bigtrain.config import UserError
from bigtrain.training.config import PassContext

if TYPE_CHECKING:
    from bigtrain.data.tokenizers import Tokenizer
    from bigtrain.engines.contract import MicroBatch

AT_ONCE: Final = 2048
"""Maximum number of sequences per evaluation; the array `sources` of a batch has one column for each."""
DEFAULT_TASK: Final = "requests"


@dataclass(frozen=True)
class Task:
    """One request: a context with its continuations, of which one is correct."""

    context: str
    continuations: tuple[str, ...]
    gold: int
    """Index of the correct continuation."""
    task: str = DEFAULT_TASK
    """Name of the task to which the request belongs."""


def read_requests(file: Path) -> list[Task]:
    """Read the requests of a file.

    Raises:
        UserError: The file cannot be read or holds no request, or a line is no valid request.
    """
    fix = 'Write a line like {"context": "1 + 1 =", "continuations": [" 2", " 3"], "gold": 0}.'
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The requests cannot be read: {error}", str(file)) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            texts, gold = tuple(value["continuations"]), value["gold"]
            request = Task(value["context"], texts, gold, value.get("task", DEFAULT_TASK))
        except (ValueError, TypeError, KeyError):
            raise UserError("The line is no request", f"{file}:{number}", fix) from None
        strings = (request.context, request.task, *texts)
        if not texts or not all(isinstance(text, str) for text in strings) or not all(texts):
            raise UserError("context and continuations must be texts, the latter not empty", f"{file}:{number}", fix)
        if not isinstance(gold, int) or not 0 <= gold < len(texts):
            raise UserError(f"gold is {gold!r}, the number of no continuation", f"{file}:{number}", fix)
        found.append(request)
    if not found:
        raise UserError("The file holds no request", str(file), fix)
    return found


class Scorer:
    """Scores the same requests any number of times, but encodes them only once."""

    def __init__(self, requests: Sequence[Task], tokenizer: Tokenizer) -> None:
        self._requests = requests
        pairs = [(request.context, text) for request in requests for text in request.continuations]
        self._rows = [encode_pair(tokenizer, *pair) for pair in pairs]

    def score(self, context: PassContext) -> dict[str, dict[str, float]]:
        """Results of each task by task name; see `results_of`. Collective; the results are equal on all ranks."""
        return results_of(self._requests, log_likelihoods(context, self._rows))


def results_of(requests: Sequence[Task], log_likelihoods: Sequence[float]) -> dict[str, dict[str, float]]:
    """Results of each task by task name.

    Args:
        log_likelihoods: Log-likelihoods, in nats, of the continuations of all requests, in order.

    Returns:
        `accuracy` by log-likelihood; `accuracy_per_character` and `accuracy_per_byte` by log-likelihood divided by the
        continuation's length; `bits_per_byte` of the correct continuations; and `requests`, the number of requests.
    """
    likelihoods = iter(log_likelihoods)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    for request in requests:
        values = np.array([next(likelihoods) for _ in request.continuations])
        characters = np.array([len(text) for text in request.continuations])
        sizes = np.array([len(text.encode()) for text in request.continuations])
        rows[request.task].append(
            {
                "accuracy": float(np.argmax(values) == request.gold),
                "accuracy_per_character": float(np.argmax(values / characters) == request.gold),
                "accuracy_per_byte": float(np.argmax(values / sizes) == request.gold),
                "bits_per_byte": -float(values[request.gold]) / float(sizes[request.gold]) / math.log(2),
            }
        )
    means = {
        task: {key: float(np.mean([one[key] for one in found])) for key in found[0]} for task, found in rows.items()
    }
    return {task: {**found, "requests": float(len(rows[task]))} for task, found in means.items()}


def log_likelihoods(context: PassContext, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    """The log-likelihood of each row's continuation after its context, in nats. Collective.

    Args:
        rows: Token ids, and how many of the last ones form the continuation; see `encode_pair`.
    """
    from bigtrain.engines.contract import Measuring  # imports torch, which the launcher of a run does not load

    found: list[float] = []
    for first in range(0, len(rows), AT_ONCE):
        part = rows[first : first + AT_ONCE]
        totals = context.engine.evaluate(iter([list(_passes(context, part))]), Measuring(sources=len(part)))
        found += [-loss for loss, _ in totals.sources]
    return found


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of context and continuation together, and how many of them belong to the continuation.

    As in lm-evaluation-harness, white space at the end of the context belongs to the continuation. Context and
    continuation are encoded together; the first tokens, as many as the context has alone, are replaced by the tokens of
    the context alone. So all continuations of a context follow the same tokens, even if a token crosses the boundary.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = [int(token) for token in tokenizer.encode(context + continuation)]
    if not context:
        return [tokenizer.eot, *whole], len(whole)
    before = [int(token) for token in tokenizer.encode(context)]
    after = whole[len(before) :] or [int(token) for token in tokenizer.encode(continuation)]
    return before + after, len(after)


def _passes(place: PassContext, rows: Sequence[tuple[list[int], int]]) -> Iterator[MicroBatch]:
    """Yield this rank's micro-batches. All ranks have equally many, of one shape; padding rows have weight 0."""
    ranks, batch_size, context = place.engine.data_parallel_size, place.batch_size, place.context
    count = -(-len(rows) // (batch_size * ranks))
    count = -(-count // place.multiple) * place.multiple
    for number in range(count):
        first = (number * ranks + place.engine.data_parallel_rank) * batch_size
        batch: dict[str, Any] = {
            "tokens": np.zeros((batch_size, context), np.int64),
            "targets": np.zeros((batch_size, context), np.int64),
            "weights": np.zeros((batch_size, context), np.float32),
            "keys": np.zeros(batch_size, np.int64),
            "sources": np.zeros((batch_size, len(rows)), np.float32),
        }
        for at, row in enumerate(range(first, min(first + batch_size, len(rows)))):
            tokens, counted = rows[row]
            counted = min(counted, context)
            tokens = tokens[-context - 1 :]
            end = len(tokens) - 1
            batch["tokens"][at, :end], batch["targets"][at, :end] = tokens[:-1], tokens[1:]
            batch["weights"][at, end - counted : end] = 1
            batch["sources"][at, row] = 1
        yield batch
