"""Forms of samples whose loss counts only some tokens, as objects of JSON lines, Parquet or Arrow.

    messages                  a conversation; the loss is on what the assistant writes       {"messages": [...]}
    prompt, completion        texts, or lists of messages; the loss is on the completion     {"prompt", "completion"}
    text, mask                a weight for each character of the text                        {"text", "mask"}
    input_ids, labels         tokens; the loss is where the label is the token and not -100  {"input_ids", "labels"}
    input_ids, loss_mask      tokens, and a weight for each                                  {"input_ids", "loss_mask"}

Each form is a class with the names of its columns. An object has the first form whose columns it holds. `--columns
prompt=question,completion=meta.answer` maps columns to other keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.encoding.chat import ASSISTANT, ChatTemplate, message_weights
from bigtrain.data.encoding.weights import WeightedTokens, weights_of_characters
from bigtrain.data.formats.records import MISSING, under
from bigtrain.data.tokenizers import Tokenizer

NO_LOSS = -100
"""The label of a token that does not count in the loss, by the convention of PyTorch and transformers."""
SHARE_GPT_ROLES = {"human": "user", "gpt": ASSISTANT, "user": "user", "system": "system", "tool": "tool"}
"""Roles of conversations whose messages have `from` and `value`."""


class Form(ABC):
    """One form in which an object can hold a sample."""

    columns: ClassVar[tuple[str, ...]]
    """Names of the columns that an object of this form must have."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that an object may have as well."""

    @abstractmethod
    def encode(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> WeightedTokens:
        """The tokens of a sample and their weights.

        Raises:
            UserError: The values do not have the types or sizes that the form requires.
        """


class Conversation(Form):
    """Messages with `role` and `content`, or with `from` and `value` as in ShareGPT."""

    columns = ("messages",)
    optional = ("tools",)

    def encode(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> WeightedTokens:
        """See `Form`."""
        messages = messages_of(values["messages"])
        tools = values.get("tools")
        return ChatTemplate.of(tokenizer).encode(messages, message_weights(messages), tools or None)


class PromptCompletion(Form):
    """A prompt without loss, and a completion with loss, which an end-of-text token follows."""

    columns = ("prompt", "completion")

    def encode(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> WeightedTokens:
        """See `Form`. Prompt and completion are encoded separately, as a prompt is encoded when the model is used."""
        prompt, completion = values["prompt"], values["completion"]
        if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
            before, after = messages_of(prompt), messages_of(completion)
            weights = [*message_weights(before, 0.0), *message_weights(after)]
            return ChatTemplate.of(tokenizer).encode([*before, *after], weights)
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise UserError("prompt and completion are neither two texts nor two lists of messages")
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        read = [*begin, *tokenizer.encode(prompt)]
        learned = [*tokenizer.encode(completion), tokenizer.eot]
        return _weighted([*read, *learned], [0.0] * len(read) + [1.0] * len(learned))


class MaskedText(Form):
    """A text and a weight for each of its characters; the end-of-text token has the weight of the last character."""

    columns = ("text", "mask")

    def encode(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> WeightedTokens:
        """See `Form`."""
        text, mask = values["text"], values["mask"]
        if not isinstance(text, str) or not isinstance(mask, (list, tuple)) or len(mask) != len(text):
            raise UserError("mask must be a list with a number for each character of text")
        by_character = np.asarray([*_numbers("mask", mask), 0.0], np.float32)
        ids, begins, ends = tokenizer.encode_with_places(text)
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        weights = [0.0] * len(begin) + weights_of_characters(begins, ends, by_character).tolist()
        return _weighted([*begin, *ids, tokenizer.eot], [*weights, float(by_character[-2]) if text else 0.0])


class LabelledTokens(Form):
    """Tokens and their labels. Labels are not shifted: the label of a token is the token itself, or -100."""

    columns = ("input_ids", "labels")

    def encode(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> WeightedTokens:
        """See `Form`."""
        ids, labels = _ids(values["input_ids"], tokenizer), np.asarray(_integers("labels", values["labels"]), np.int64)
        if len(ids) != len(labels):
            raise UserError(f"there are {len(ids)} input_ids and {len(labels)} labels")
        learned = labels != NO_LOSS
        if (labels[learned] != ids[learned]).any():
            shifted = learned[:-1]
            what = "labels are neither the tokens themselves nor -100"
            if (labels[:-1][shifted] == ids[1:][shifted]).all():
                what = "labels are shifted by one position"
            raise UserError(what, fix="Give the label of a token at the token's own position.")
        return WeightedTokens(ids, learned.astype(np.float32))


class MaskedTokens(Form):
    """Tokens and a weight for each token. Weights are not shifted."""

    columns = ("input_ids", "loss_mask")

    def encode(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> WeightedTokens:
        """See `Form`."""
        ids, mask = _ids(values["input_ids"], tokenizer), values["loss_mask"]
        if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
            raise UserError("loss_mask must be a list with a number for each of input_ids")
        return WeightedTokens(ids, np.asarray(_numbers("loss_mask", mask), np.float32))


FORMS: tuple[Form, ...] = (Conversation(), PromptCompletion(), LabelledTokens(), MaskedTokens(), MaskedText())
ALIASES = {"completion": "response", "messages": "conversations"}
"""Alternative names of columns, which are used if an object lacks the column itself."""


def parse_columns(text: str) -> dict[str, str]:
    """Parse "prompt=question,completion=meta.answer" into the key of each column.

    Raises:
        UserError: The text has another syntax, or names a column that no form has.
    """
    known = sorted({name for form in FORMS for name in (*form.columns, *form.optional)})
    found = {}
    for part in text.split(","):
        name, equals, key = (one.strip() for one in part.partition("="))
        if not equals or not key or name not in known:
            raise UserError(
                f"{part!r} is not of the form COLUMN=KEY",
                "--columns",
                f"Write for example prompt=question,completion=answer. Columns are {', '.join(known)}.",
            )
        found[name] = key
    return found


def keys_of(columns: Mapping[str, str]) -> list[str]:
    """All keys under which an object may hold parts of a sample. Other columns of a table need not be read."""
    names = [name for form in FORMS for name in (*form.columns, *form.optional)]
    return list(dict.fromkeys([*(columns.get(name, name) for name in names), *ALIASES.values()]))


def encode_record(value: Mapping[str, Any], tokenizer: Tokenizer, columns: Mapping[str, str]) -> WeightedTokens:
    """The tokens of an object and their weights.

    Raises:
        UserError: The object has no known form, its values do not fit the form, or all weights are zero.
    """
    for form in FORMS:
        values = {name: _value(value, name, columns) for name in (*form.columns, *form.optional)}
        if all(values[name] is not MISSING for name in form.columns):
            encoded = form.encode({key: one for key, one in values.items() if one is not MISSING}, tokenizer)
            return _checked(encoded)
    forms = "; ".join(", ".join(form.columns) for form in FORMS)
    raise UserError(
        f"the object has the keys {', '.join(map(str, value))}, which do not form a sample",
        fix=f"Name the columns with --columns. Samples are {forms}.",
    )


def messages_of(value: Any) -> list[Mapping[str, Any]]:
    """Convert the messages of a conversation to the form that chat templates expect.

    Raises:
        UserError: The value is no list of messages.
    """
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Mapping) for one in value):
        raise UserError("messages must be a list of objects with role and content")
    found: list[Mapping[str, Any]] = []
    for message in value:
        # In a table, all messages have all keys; keys that a message lacks are None.
        kept = {key: one for key, one in message.items() if one is not None}
        if "role" not in kept and kept.get("from") in SHARE_GPT_ROLES:
            kept = {"role": SHARE_GPT_ROLES[kept["from"]], "content": kept.get("value")}
        if not isinstance(kept.get("role"), str) or not ({"content", "tool_calls"} & kept.keys()):
            raise UserError("a message has no role, or neither content nor tool_calls")
        found.append(kept)
    return found


def _value(value: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    found = under(value, columns.get(name, name))
    if found is MISSING and name not in columns and name in ALIASES:
        found = under(value, ALIASES[name])
    return MISSING if found is None else found


def _checked(sample: WeightedTokens) -> WeightedTokens:
    if not np.isfinite(sample.weights).all() or (sample.weights < 0).any():
        raise UserError("a weight is negative or not a number")
    # The first token is never predicted, so its weight does not count.
    if not sample.weights[1:].any():
        raise UserError(
            "no token of the sample has a weight above zero", fix="Remove the sample, or allow it with --skip-bad."
        )
    return sample


def _weighted(ids: Sequence[int], weights: Sequence[float]) -> WeightedTokens:
    return WeightedTokens(np.asarray(ids, np.int64), np.asarray(weights, np.float32))


def _ids(value: Any, tokenizer: Tokenizer) -> Any:
    ids = np.asarray(_integers("input_ids", value), np.int64)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= tokenizer.vocab_size):
        raise UserError(
            f"input_ids range from {ids.min()} to {ids.max()}, but the tokenizer has {tokenizer.vocab_size} tokens"
        )
    return ids


def _integers(name: str, value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)) or not all(type(one) is int for one in value):
        raise UserError(f"{name} must be a list of whole numbers")
    return list(value)


def _numbers(name: str, value: Sequence[Any]) -> list[float]:
    if not all(isinstance(one, (bool, int, float)) for one in value):
        raise UserError(f"{name} must be a list of numbers")
    return [float(one) for one in value]
