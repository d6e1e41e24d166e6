"""Converts SentencePiece models (`tokenizer.model`) to tokenizers of the library `tokenizers`.

A model specifies how text is normalised (such as NFKC, collapsed spaces, a space before the first word), and whether
its type is unigram or BPE. Models of words and of characters are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer

UNIGRAM, BPE = 1, 2
"""Values of `trainer_spec.model_type` in sentencepiece_model.proto."""
CONTROL, USER_DEFINED = 3, 4
"""Values of the `type` of a piece."""
SPACE = "▁"


def read_pieces(path: Path, added: dict[str, Any] | None = None) -> HuggingFaceTokenizer:
    """Read the tokenizer of a SentencePiece model; control pieces become special tokens.

    Args:
        added: `added_tokens_decoder` of the tokenizer_config.json: tokens by their id as a string.

    Raises:
        UserError: The file is no unigram or BPE model, or an added token would get another id.
    """
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Backend
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # noqa: BLE001 - protobuf's DecodeError lies where its implementation lies
        raise UserError(f"not a SentencePiece model: {error}", str(path)) from None
    trained = proto.trainer_spec
    if trained.model_type not in (UNIGRAM, BPE) or not proto.pieces:
        raise UserError(
            "the SentencePiece model is neither a unigram nor a BPE model",
            str(path),
            "Convert it to a tokenizer.json, or use a unigram or BPE model.",
        )
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    if trained.model_type == UNIGRAM:
        model: Any = models.Unigram(scores, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback)
    else:
        vocabulary = {piece: id for id, (piece, _) in enumerate(scores)}
        apart = [piece.piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)]
        model = models.BPE(
            vocabulary, generate_merges(vocabulary, dict(scores), apart), unk_token=trained.unk_piece, fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )  # fmt: skip
    backend = Backend(model)
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
            for piece in proto.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    for id, token in sorted((added or {}).items(), key=lambda item: int(item[0])):
        kept = {key: token[key] for key in ("lstrip", "rstrip", "normalized", "single_word", "special") if key in token}
        backend.add_tokens([AddedToken(token["content"], **kept)])
        if backend.token_to_id(token["content"]) != int(id):
            raise UserError(f"the added token {token['content']!r} does not get the id {id}", str(path))
    _set_steps(backend, proto)
    return backend


def _set_steps(backend: HuggingFaceTokenizer, proto: Any) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    rule, trained = proto.normalizer_spec, proto.trainer_spec
    steps: list[Any] = [normalizers.Precompiled(rule.precompiled_charsmap)] if rule.precompiled_charsmap else []
    has_prefix, collapses = bool(rule.add_dummy_prefix), bool(rule.remove_extra_whitespaces)
    if collapses:
        # A space before the first word then serves as the prefix, and no other one is added.
        steps += [normalizers.Strip(left=not has_prefix), normalizers.Replace(Regex(" {2,}"), " ")]
    scheme: Any = "first" if has_prefix else "never"
    if has_prefix and not collapses and all(piece.type != USER_DEFINED for piece in proto.pieces):
        # Spaces at the beginning are kept, after the prefix. Metaspace would repeat the prefix after each such symbol.
        steps += [normalizers.Replace(" ", SPACE), normalizers.Prepend(SPACE)]
        scheme = "never"
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    by_word = bool(trained.split_by_whitespace)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=by_word)
    decoding: list[Any] = [decoders.Replace(SPACE, " ")]
    decoding += [decoders.ByteFallback()] if trained.byte_fallback else []
    decoding += [decoders.Fuse()]
    decoding += [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(decoding)
