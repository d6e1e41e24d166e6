"""Preference pairs as stored in JSON objects: a prompt, a chosen answer and a rejected answer.

    prompt, chosen, rejected   Three texts; or three lists of messages. Answers may repeat the prompt's messages.
    chosen, rejected           Two texts or two conversations; the prompt is their common beginning. A prompt that is a
                               text is ignored beside conversations.

These are the formats of Hugging Face's trl: explicit and implicit prompts, standard and conversational.
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
        """Prompt, chosen answer and rejected answer."""
        return [self.prompt, self.chosen, self.rejected]

    def encode(self, tokenizer: Tokenizer) -> dict[str, Ids]:
        """The token ids of each part, encoded separately, with an end-of-text token after each answer."""
        prompt, chosen, rejected = ([int(id) for id in tokenizer.encode(text)] for text in self.texts)
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        return {
            # A token must precede the answer: if there are no prompt and no begin-of-text token, the end-of-text token.
            "prompt": [*begin, *prompt] or [tokenizer.eot],
            "chosen": [*chosen, tokenizer.eot],
            "rejected": [*rejected, tokenizer.eot],
        }


@dataclass(frozen=True)
class ChatPair:
    """A conversation, and two alternative turns of the assistant that follow it. All fields are JSON."""

    prompt: str
    """A list of messages. It is JSON, as the other fields, so that the pair is hashable."""
    chosen: str
    rejected: str
    tools: str = "null"

    @property
    def texts(self) -> list[str]:
        """Prompt, chosen answer and rejected answer, as JSON."""
        return [self.prompt, self.chosen, self.rejected]

    def encode(self, tokenizer: Tokenizer) -> dict[str, Ids]:
        """The token ids of each part, by the tokenizer's chat template.

        An answer consists of the tokens of the last turn that the template marks as written by the assistant. If a
        token merges the start of an answer with the text before it, the answers start at the first token in which the
        two conversations differ.

        Raises:
            UserError: The tokenizer has no template, or the template does not accept the messages.
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
    """Parse an object as a preference pair.

    Raises:
        UserError: The object is no preference pair.
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
        # A trailing space belongs to the next word.
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
    """Length of the common beginning of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _check_characters(texts: Iterable[str]) -> None:
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the object holds an unpaired surrogate") from None
