"""Preferences as they lie in objects: a prompt, and answers of which one was chosen and one rejected.

    prompt, chosen, rejected   texts; or a prompt of messages, and answers of messages, with or without it before them
    chosen, rejected           the prompt is what both begin with, of conversations or texts; a text beside
                               conversations is not read

These are the forms of Hugging Face's trl: explicit and implicit prompts, standard and conversational.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.encoding.chat import ASSISTANT, ChatTemplate, Message
from bigtrain.data.encoding.forms import messages_of
from bigtrain.data.tokenizers import Tokenizer

PARTS: Final = ("prompt", "chosen", "rejected")
_FIX: Final = (
    'Write "prompt", "chosen" and "rejected" as texts with answers that are not empty, or as lists of messages. '
    'Without "prompt", the common beginning of both answers is the prompt.'
)

Ids = list[int]


@dataclass(frozen=True)
class TextPair:
    """A prompt and two answers as texts."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def texts(self) -> list[str]:
        """All that it holds."""
        return [self.prompt, self.chosen, self.rejected]

    def encode(self, tokenizer: Tokenizer) -> dict[str, Ids]:
        """The tokens of each part, encoded one by one, and an end of text after each answer."""
        prompt, chosen, rejected = ([int(id) for id in tokenizer.encode(text)] for text in self.texts)
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        return {
            # Something must stand before an answer: without a prompt and a begin of text, an end of text.
            "prompt": [*begin, *prompt] or [tokenizer.eot],
            "chosen": [*chosen, tokenizer.eot],
            "rejected": [*rejected, tokenizer.eot],
        }


@dataclass(frozen=True)
class ChatPair:
    """A conversation and two turns of the assistant that may follow it."""

    prompt: str
    """Messages, as JSON: so that the pair is a plain value."""
    chosen: str
    rejected: str
    tools: str = "null"

    @property
    def texts(self) -> list[str]:
        """All that it holds, in JSON."""
        return [self.prompt, self.chosen, self.rejected]

    def encode(self, tokenizer: Tokenizer) -> dict[str, Ids]:
        """The tokens by the tokenizer's chat template: an answer is what the template counts of the last turn.

        Where a token joins the answer's beginning to what stands before it, the answers begin at the first token in
        which the two conversations differ.

        Raises:
            UserError: The tokenizer has no template, or the messages do not fit it.
        """
        template, before = ChatTemplate.of(tokenizer), json.loads(self.prompt)
        sides: list[tuple[Ids, Ids]] = []
        for answer in (self.chosen, self.rejected):
            weights = [*[0.0] * len(before), 1.0]
            sample = template.encode([*before, json.loads(answer)], weights, json.loads(self.tools))
            (counted,) = np.nonzero(sample.weights)
            if not len(counted):
                raise UserError("the chat template writes nothing for an answer")
            first, end = int(counted[0]), int(counted[-1]) + 1
            sides.append((sample.ids[:first].tolist(), sample.ids[first:end].tolist()))
        shared = _shared(sides[0][0], sides[1][0])
        if not shared:
            raise UserError("the chat template writes no common prompt before the two answers")
        chosen, rejected = (prompt[shared:] + answer for prompt, answer in sides)
        return {"prompt": sides[0][0][:shared], "chosen": chosen, "rejected": rejected}


def read_pair(value: Any) -> TextPair | ChatPair:
    """The pair that an object holds.

    Raises:
        UserError: It holds none.
    """
    if not isinstance(value, Mapping):
        raise UserError("it is not a JSON object", fix=_FIX)
    prompt, chosen, rejected = (value.get(part) for part in PARTS)
    if isinstance(chosen, (list, tuple)) and isinstance(rejected, (list, tuple)):
        return _chat(prompt, (messages_of(chosen), messages_of(rejected)), value.get("tools") or None)
    if not (isinstance(chosen, str) and isinstance(rejected, str)) or not isinstance(prompt, (str, type(None))):
        raise UserError("the object is not a preference", fix=_FIX)
    if prompt is None:
        prompt = chosen[: _shared(chosen, rejected)]
        # A space belongs to the word after it.
        prompt = prompt[:-1] if prompt.endswith(" ") else prompt
        chosen, rejected = chosen.removeprefix(prompt), rejected.removeprefix(prompt)
    if not (chosen and rejected):
        raise UserError("the object is not a preference: an answer is empty", fix=_FIX)
    _check_characters((prompt, chosen, rejected))
    return TextPair(prompt, chosen, rejected)


def _chat(prompt: Any, answers: Sequence[list[Message]], tools: Any) -> ChatPair:
    if isinstance(prompt, (list, tuple)) and prompt:
        before = messages_of(prompt)
        has_prompt = all(answer[: len(before)] == before for answer in answers)
        answers = answers if has_prompt else [[*before, *answer] for answer in answers]
    chosen, rejected = answers
    shared = _shared(chosen, rejected)
    if not shared:
        raise UserError("the two conversations have no common beginning, so there is no prompt", fix=_FIX)
    if {len(chosen), len(rejected)} != {shared + 1} or {chosen[-1]["role"], rejected[-1]["role"]} != {ASSISTANT}:
        raise UserError(
            f"after {shared} common messages, each conversation must have exactly one more turn, of the assistant",
            fix="End both conversations with the turn in which they differ.",
        )
    parts = [json.dumps(part, ensure_ascii=False) for part in (chosen[:shared], chosen[-1], rejected[-1], tools)]
    _check_characters(parts)
    return ChatPair(*parts)


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many entries both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _check_characters(texts: Iterable[str]) -> None:
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the object holds an unpaired surrogate") from None
