"""Tokens with a weight each: what a loss counts of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.data.tokenizers import Tokens

Weights = list[float]


@dataclass(frozen=True)
class WeightedTokens:
    """A sample of text."""

    ids: Tokens
    """int64 (n,)."""
    weights: npt.NDArray[np.float32]
    """(n,): how much the loss counts the prediction of each token; 0 for what is only read."""


def weights_at(
    begins: Tokens, ends: Tokens, spans: Sequence[tuple[int, int, float]], length: int
) -> npt.NDArray[np.float32]:
    """The weight of each token, by the spans of characters that have one.

    A token that lies partly in a span has its weight; one of no width has that of the character before which it stands.

    Args:
        begins, ends: First character of each token, and one past its last.
        spans: First character, one past the last, weight.
        length: Characters of the text.
    """
    by_character = np.zeros(length + 1, np.float32)
    for begin, end, weight in spans:
        by_character[begin:end] = weight
    return weights_of_characters(begins, ends, by_character)


def weights_of_characters(
    begins: Tokens, ends: Tokens, by_character: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The weight of each token: the greatest of its characters'.

    Args:
        by_character: Of each character, and 0 after the last.
    """
    found = by_character[begins].copy()
    for offset in range(1, int((ends - begins).max(initial=0))):
        inside = begins + offset < ends
        np.maximum.at(found, np.flatnonzero(inside), by_character[begins[inside] + offset])
    return found
