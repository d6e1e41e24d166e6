"""Encodes conversations with a tokenizer's chat template, and finds the tokens that the assistant writes.

Only the template writes special tokens. If the text of a message contains the characters of a special token, they stay
ordinary text: before rendering, each occurrence is replaced by one character of a private area of Unicode; afterwards
it is restored and encoded as ordinary text.

The assistant's text is what the template marks with {% generation %}. A template without such marks is rendered twice
for each turn of the assistant: up to the turn with the generation prompt, and up to the turn's end. The difference is
the assistant's text, without white space after its last special token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.encoding.files import TEMPLATE_NAME, content_of
from bigtrain.data.encoding.weights import WeightedTokens, Weights, weights_at
from bigtrain.data.tokenizers import Tokenizer, Tokens

ASSISTANT = "assistant"
PRIVATE_AREAS = (0xF0000, 0x100000)
"""First characters of the two private planes of Unicode."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NO_TEMPLATE = "Give a template with --chat-template FILE, or a tokenizer that has one."
_MARK_IT = "Mark what the assistant writes with {% generation %} ... {% endgeneration %} in a --chat-template FILE."

Message = Mapping[str, Any]
Span = tuple[int, int, float]
"""First character of a span, one past its last character, and weight."""


def template_of(tokenizer: Tokenizer) -> str | None:
    """The chat template among a tokenizer's files; None if there is none. Of several, the one named "default"."""
    if TEMPLATE_NAME in tokenizer.companions:
        return tokenizer.companions[TEMPLATE_NAME]
    value = tokenizer.config.get("chat_template")
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def ends_of_texts(tokenizer: Tokenizer) -> list[int]:
    """The tokens at which a generated text ends: the end-of-text token, then those that end a turn in the template."""
    turns = ChatTemplate.of(tokenizer).ends_of_turns() if template_of(tokenizer) is not None else set()
    return [tokenizer.eot, *sorted(turns - {tokenizer.eot})]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer together with its chat template."""

    tokenizer: Tokenizer
    source: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template of a tokenizer.

        Raises:
            UserError: The tokenizer has no chat template.
        """
        source = template_of(tokenizer)
        if source is None:
            raise UserError("the tokenizer has no chat template", fix=_NO_TEMPLATE)
        return cls(tokenizer, source)

    def encode(self, messages: Sequence[Message], weights: Sequence[float], tools: Any = None) -> WeightedTokens:
        """Encode a conversation as tokens with weights.

        Args:
            messages: Messages with a role and a content, as the template expects them.
            weights: The weight of each message; only the weights of the assistant's messages are used.
            tools: The value of `tools` in the template.

        Raises:
            UserError: The messages do not fit the template, or the template changes a turn when others follow it.
        """
        plain, base = self._hidden([messages, tools])
        hidden, hidden_tools = plain
        whole, spans = self._spans(hidden, weights, hidden_tools)
        ids, begins, ends = self._encoded(whole, base)
        return WeightedTokens(ids, weights_at(begins, ends, spans, len(whole)))

    def prompt(self, messages: Sequence[Message]) -> Tokens:
        """The tokens of a conversation, with the generation prompt after which the assistant continues."""
        (hidden, no_tools), base = self._hidden([messages, None])
        return self._encoded(self._render(hidden, no_tools, True)[0], base)[0]

    def ends_of_turns(self) -> set[int]:
        """The special tokens that end the assistant's turns; empty if the template has no such token."""
        example = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}]
        try:
            sample = self.encode(example, [0.0, 1.0])
        except UserError:
            return set()
        last = int(sample.ids[np.flatnonzero(sample.weights)[-1]]) if sample.weights.any() else None
        return {last} & set(self.tokenizer.special_tokens.values()) if last is not None else set()

    @cached_property
    def _special(self) -> list[str]:
        return sorted(self.tokenizer.special_tokens, key=len, reverse=True)

    @cached_property
    def _names(self) -> dict[str, str]:
        """The values of bos_token, eos_token and so on in templates."""
        found = {key: content_of(value) for key, value in self.tokenizer.config.items() if key.endswith("_token")}
        named = {key: value for key, value in found.items() if value is not None}
        end = self.tokenizer.token_of(self.tokenizer.eot)
        return {"eos_token": end or "", **named}

    def _render(self, messages: Sequence[Message], tools: Any, prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marked = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self._has_marks,
                **self._names,
            )
        except Exception as error:  # noqa: BLE001 - a template is a program of its own, which may raise anything
            raise UserError(f"the messages do not fit the chat template: {error}") from None
        return str(texts[0]), list(marked[0]) if marked else []

    @cached_property
    def _has_marks(self) -> bool:
        return _MARKS.search(self.source) is not None

    def _spans(self, messages: Sequence[Message], weights: Sequence[float], tools: Any) -> tuple[str, list[Span]]:
        """The full conversation as text, and the spans that the assistant writes."""
        whole, marked = self._render(messages, tools, False)
        turns = [number for number, message in enumerate(messages) if message.get("role") == ASSISTANT]
        if not self._has_marks:
            counted = [number for number in turns if weights[number]]
            return whole, [self._turn(messages, number, whole, weights[number], tools) for number in counted]
        if len(marked) == len(turns):
            return whole, [(*span, weights[turn]) for span, turn in zip(marked, turns, strict=True)]
        if len({weights[turn] for turn in turns}) > 1:
            raise UserError(
                "the turns have different weights, but the template does not mark exactly one span for each turn"
            )
        return whole, [(*span, weights[turns[0]]) for span in marked] if turns else []

    def _turn(self, messages: Sequence[Message], number: int, whole: str, weight: float, tools: Any) -> Span:
        bare = self._render(messages[:number], tools, False)[0] if number else ""
        before = self._render(messages[:number], tools, True)[0] if number else bare
        after = self._render(messages[: number + 1], tools, False)[0]
        if before == bare:
            # Without a generation prompt, the start of the turn can only be found by its text.
            content = str(messages[number].get("content")).strip()
            place = after.find(content, len(before)) if after.startswith(before) else -1
            before = after[:place] if place >= 0 else before
            if place < 0:
                raise UserError("the chat template changes the assistant's text", fix=_MARK_IT)
        if not after.startswith(before) or not whole.startswith(after):
            raise UserError("the chat template writes a turn differently when other turns follow it", fix=_MARK_IT)
        turn = after[len(before) :]
        trimmed = turn.rstrip()
        return len(before), len(before) + len(trimmed if trimmed.endswith(tuple(self._special)) else turn), weight

    def _hidden(self, value: list[Any]) -> tuple[list[Any], int]:
        """Replace special tokens in messages by private characters. Returns the messages and the first such character.

        The first character is 0 if the messages contain no special token.
        """
        found = "".join(_strings(value))
        present = [token for token in self._special if token in found]
        if not present:
            return value, 0
        for base in PRIVATE_AREAS:
            used = range(base, base + len(self._special))
            if not any(ord(character) in used for character in found):
                pattern = re.compile("|".join(map(re.escape, self._special)))
                place = {token: chr(base + number) for number, token in enumerate(self._special)}
                return list(_replaced(value, pattern, place)), base
        raise UserError("the messages hold special tokens and characters of both private planes of Unicode")

    def _encoded(self, text: str, base: int) -> tuple[Tokens, Tokens, Tokens]:
        """The tokens of a rendered text, the first character of each token, and one past its last character."""
        if not base:
            return self.tokenizer.encode_with_places(text, special=True)
        parts: list[tuple[Tokens, Tokens, Tokens]] = []
        for begin, segment, token in self._segments(text):
            if token is not None:
                id, size = self.tokenizer.special_tokens[token], len(segment)
                parts.append((np.asarray([id]), np.asarray([begin]), np.asarray([begin + size])))
            elif segment:
                parts.append(self._plain(segment, begin, base))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]

    def _segments(self, text: str) -> Iterator[tuple[int, str, str | None]]:
        """Yield the segments of a text: ordinary text and special tokens.

        Each segment has its first character, its text, and the special token (None for ordinary text).
        """
        last = 0
        for match in self._pattern.finditer(text):
            yield last, text[last : match.start()], None
            token = match.group().strip()
            yield match.start(), match.group(), token if token in self.tokenizer.special_tokens else match.group()
            last = match.end()
        yield last, text[last:], None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        strips = self.tokenizer.special_strips
        return re.compile("|".join(f"{strips[one][0]}{re.escape(one)}{strips[one][1]}" for one in self._special))

    def _plain(self, segment: str, begin: int, base: int) -> tuple[Tokens, Tokens, Tokens]:
        """The tokens of a segment in which special tokens are replaced, with positions in the rendered text."""
        pieces, places = [], []
        for number, character in enumerate(segment):
            hidden = ord(character) - base
            piece = self._special[hidden] if 0 <= hidden < len(self._special) else character
            pieces.append(piece)
            places += [begin + number] * len(piece)
        ids, begins, ends = self.tokenizer.encode_with_places("".join(pieces), special=False)
        at = np.asarray([*places, begin + len(segment)], dtype=np.int64)
        last = np.maximum(ends - 1, begins)
        return ids, at[begins], np.where(ends > begins, at[last] + 1, at[begins])


def message_weights(messages: Sequence[Message], default: float = 1.0) -> Weights:
    """The weight of each message: for the assistant, its key `weight`, else `default`; 0 for other roles."""
    return [float(one.get("weight", default)) if one.get("role") == ASSISTANT else 0.0 for one in messages]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _replaced(value: Any, pattern: re.Pattern[str], place: dict[str, str]) -> Any:
    if isinstance(value, str):
        return pattern.sub(lambda match: place[match.group()], value)
    if isinstance(value, Mapping):
        return {key: _replaced(inner, pattern, place) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(inner, pattern, place) for inner in value]
    return value
