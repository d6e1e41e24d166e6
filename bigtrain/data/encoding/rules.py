"""Begin-of-text and mask tokens: the rule by which a tokenizer adds them, and the rule of an exported tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from bigtrain.config import UserError
from bigtrain.data.encoding.files import content_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

BeginOfText = Literal["no", "yes", "rule"]
"""Whether documents begin with a begin-of-text token: never, always, or if the tokenizer's own rule adds one."""


def begin_of_text(
    backend: HuggingFaceTokenizer, config: dict[str, Any], bos: BeginOfText, where: str | None
) -> int | None:
    """Id of the begin-of-text token of documents; None: documents begin without one.

    Args:
        config: Content of the tokenizer_config.json, which may name a `bos_token`.
        where: The file of the tokenizer, for error messages.

    Raises:
        UserError: A begin-of-text token is required, and the tokenizer names none.
    """
    if bos == "no":
        return None
    plain, ruled = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    if ruled[:1] != plain[:1]:
        return int(ruled[0])
    if bos == "rule" and not config.get("add_bos_token"):
        return None
    named = content_of(config.get("bos_token"))
    id = None if named is None else backend.token_to_id(named)
    if id is None:
        raise UserError(
            "the tokenizer has no begin-of-text token", where, "Omit --bos, or set bos_token in tokenizer_config.json."
        )
    return int(id)


BERT_NAMES = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}
"""Special tokens that BERT's files do not name, because the class of its tokenizer defines them."""


def add_mask(backend: HuggingFaceTokenizer, definition: dict[str, Any], config: dict[str, Any], mask: int) -> None:
    """Name the special tokens in the files of an exported tokenizer, for a masked language model.

    Args:
        definition: Content of tokenizer.json, changed in place. If the mask token is not in the vocabulary, it is added
            as [MASK], or as <mask> if that name is in use.
        config: Content of tokenizer_config.json, changed in place; names that it has already are kept.
        mask: Id of the mask token.
    """
    for key, usual in BERT_NAMES.items():
        if backend.token_to_id(content_of(config.get(key)) or usual) is not None:
            config.setdefault(key, usual)
    name = backend.id_to_token(mask)
    if name is None:
        name = "[MASK]" if backend.token_to_id("[MASK]") is None else "<mask>"
        marks = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        definition["added_tokens"].append({"id": mask, "content": name, **marks, "special": True})
    config["mask_token"] = name


def exported_rule(step: dict[str, Any] | None, bos: tuple[str, int] | None) -> dict[str, Any] | None:
    """A post-processor, as JSON, that adds `bos` and no other special token.

    Args:
        step: The tokenizer's own post-processor, as JSON.
        bos: The begin-of-text token and its id; None: no token is added.
    """
    kept = without_special_tokens(step)
    if bos is None:
        return kept
    token, id = bos
    single: list[dict[str, Any]] = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    adds = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }
    return adds if kept is None else {"type": "Sequence", "processors": [kept, adds]}


def without_special_tokens(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A tokenizer's post-processor without the parts that add special tokens to a text."""
    if step is None or step.get("type") in ("TemplateProcessing", "BertProcessing", "RobertaProcessing"):
        return None
    if step.get("type") == "Sequence":
        kept = [one for one in map(without_special_tokens, step.get("processors", [])) if one is not None]
        return {**step, "processors": kept} if kept else None
    return step
