"""Tokens with weights: how much each token of a sample counts in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bigtrain.data.tokenizers import Tokens

Weights = list[float]


@dataclass(frozen=True)
class WeightedTokens:
    """The tokens of a sample of text, with their weights."""

    ids: Tokens
    """Token ids, int64 of shape (n,)."""
    weights: npt.NDArray[np.float32]
    """How much the prediction of each token counts in the loss, float32 of shape (n,); 0 for tokens of a prompt."""


def weights_at(
    begins: Tokens, ends: Tokens, spans: Sequence[tuple[int, int, float]], length: int
) -> npt.NDArray[np.float32]:
    """The weight of each token, from spans of characters with weights.

    A token that lies partly in a span has the span's weight. A token without characters has the weight of the next
    character.

    Args:
        begins, ends: First character of each token, and one past its last character.
        spans: First character of each span, one past its last character, and its weight.
        length: Number of characters of the text.
    """
    by_character = np.zeros(length + 1, np.float32)
    for begin, end, weight in spans:
        by_character[begin:end] = weight
    return weights_of_characters(begins, ends, by_character)


def weights_of_characters(
    begins: Tokens, ends: Tokens, by_character: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The weight of each token: the maximum weight of its characters.

    Args:
        begins, ends: First character of each token, and one past its last character.
        by_character: The weight of each character, followed by a 0.
    """
    found = by_character[begins].copy()
    for offset in range(1, int((ends - begins).max(initial=0))):
        inside = begins + offset < ends
        np.maximum.at(found, np.flatnonzero(inside), by_character[begins[inside] + offset])
    return found
