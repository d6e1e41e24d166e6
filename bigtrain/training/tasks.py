"""Scores requests, each a context and continuations (requests.py), by the log-likelihood of each continuation.

Texts are tokenized as in lm-evaluation-harness: context and continuation are encoded together, spaces at the end of the
context move to the continuation, and a context that is too long loses its beginning. Every sequence is a separate
source in the engine's sums, so each is scored exactly once at every layout.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bigtrain.training.config import PassContext
from bigtrain.training.requests import Task

if TYPE_CHECKING:
    from bigtrain.data.tokenizers import Tokenizer
    from bigtrain.engines.contract import MicroBatch

AT_ONCE: Final = 2048
"""Maximum number of sequences in one evaluation; the batch array `sources` has a column for each."""


class Scorer:
    """Scores the same requests any number of times, but encodes them only once."""

    def __init__(self, requests: Sequence[Task], tokenizer: Tokenizer) -> None:
        self._requests = requests
        self._rows = [
            (encode_apart if request.apart else encode_pair)(tokenizer, request.context, text)
            for request in requests
            for text in request.continuations
        ]

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


def encode_apart(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Like `encode_pair`, but context and continuation are encoded separately, as in OLMo's in-loop evaluation.

    The context starts with the begin-of-text token, if the tokenizer adds one to documents.
    """
    before, after = ([int(token) for token in tokenizer.encode(text)] for text in (context, continuation))
    if tokenizer.bos is not None and before[:1] != [tokenizer.bos]:
        before = [tokenizer.bos, *before]
    return [*(before or [tokenizer.eot]), *after], len(after)


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
