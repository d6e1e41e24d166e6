"""Samples of which the loss counts a part: conversations against transformers, the other forms, packed and not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

from bigtrain.config import UserError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.encoding import chat, forms
from bigtrain.data.encoding.chat import ChatTemplate
from bigtrain.data.encoding.forms import encode_record, parse_columns
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.inspect import inspect, verify
from bigtrain.data.kind import kind_named
from bigtrain.data.kinds.supervised import SupervisedReader
from bigtrain.data.loader import Loader
from bigtrain.data.order.bins import bins, count_bins
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.overlap import texts_of
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.streaming.store import open_index
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.training.sample import _OfData
from tests.data.chats import CONVERSATIONS, TEMPLATES, TURN_ENDS, reference, write_tokenizer

CONTEXT = 160
Row = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]


def pack(lines: list[Any], out: Path, tokenizer: Tokenizer, **options: Any) -> ShardIndex:
    file = out.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, lines)))
    kind_named("supervised").pack([file], out, PackOptions(tokenizer=tokenizer, **options))
    return load_index(out / "train")


def rows(index: ShardIndex, packed: bool, context: int = CONTEXT, streaming: Any = None) -> Counter[Row]:
    """Tokens read, targets and weights of every sample of an epoch; and what pads a sequence counts nothing."""
    counts = index.sequence_counts(context, packed)
    order = SampleOrder(0, index.fingerprint, counts, 2)
    found: Counter[Row] = Counter()
    with Loader(
        index, order, batch_size=sum(counts), context=context, document_mask=packed, streaming=streaming
    ) as loader:
        (arrays,) = loader.batch(0).micro_batches
    for place in range(sum(counts)):
        documents = arrays["documents"][place] if packed else np.zeros(context, int)
        for number in range(int(documents.max()) + 1):
            inside = documents == number
            if packed:
                assert arrays["positions"][place][inside].tolist() == list(range(int(inside.sum())))
            tokens, targets, weights = (arrays[name][place][inside] for name in ("tokens", "targets", "weights"))
            used = np.flatnonzero(weights)
            if len(used):
                # Whatever follows the last token that counts may be padding.
                end = int(used[-1]) + 1
                found[tuple(tokens[:end]), tuple(targets[:end]), tuple(weights[:end])] += 1
    return found


def expected(kind: str, directory: Path) -> Counter[Row]:
    found: Counter[Row] = Counter()
    for conversation in CONVERSATIONS:
        ids, mask = reference(kind, directory, conversation)
        end = len(mask) - mask[::-1].index(1)
        found[tuple(ids[: end - 1]), tuple(ids[1:end]), tuple(map(float, mask[1:end]))] += 1
    return found


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_tokenizer(kind, root / kind) for kind in TEMPLATES}


@pytest.fixture
def chatml(tokenizers: dict[str, Path]) -> Tokenizer:
    return Tokenizer.open(str(tokenizers["chatml"]))


LINES = [{"messages": conversation} for conversation in CONVERSATIONS]


@pytest.mark.parametrize("eot", [0, 1])
@pytest.mark.parametrize("kind", ["chatml", "gemma"])
def test_texts_end_at_the_end_of_text_and_at_the_end_of_a_turn(
    kind: str, eot: int, tokenizers: dict[str, Path]
) -> None:
    name = (TEMPLATES[kind][1][0 if kind == "chatml" else 1], TURN_ENDS[kind])[eot]
    tokenizer = Tokenizer.open(str(tokenizers[kind]), name)
    both = [tokenizer.eot, tokenizer.special_tokens[TURN_ENDS[kind]]]
    assert chat.ends_of_texts(tokenizer) == (both[:1] if eot else both)
    assert chat.ends_of_texts(Tokenizer()) == [256]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma"])
def test_the_loss_is_on_what_the_assistant_writes(kind: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    index = pack(LINES, tmp_path / "out", Tokenizer.open(str(tokenizers[kind])))
    wanted = expected(kind, tokenizers[kind])
    assert rows(index, packed=False) == wanted
    assert rows(index, packed=True) == wanted
    assert sum(index.sequence_counts(CONTEXT, True)) < sum(index.sequence_counts(CONTEXT)) == len(CONVERSATIONS)


def test_marks_of_a_template_are_those_of_transformers(tokenizers: dict[str, Path]) -> None:
    hf_tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tokenizers["marked"])
    template = ChatTemplate.of(Tokenizer.open(str(tokenizers["marked"])))
    for conversation in CONVERSATIONS:
        found = template.encode(conversation, [1.0] * len(conversation))
        wanted = hf_tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
        assert found.ids.tolist() == wanted["input_ids"]
        assert found.weights.tolist() == wanted["assistant_masks"]


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma"])
def test_a_prompt_for_the_assistant_is_that_of_transformers(kind: str, tokenizers: dict[str, Path]) -> None:
    hf_tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tokenizers[kind])
    tokenizer = Tokenizer.open(str(tokenizers[kind]))
    template = ChatTemplate.of(tokenizer)
    asked = CONVERSATIONS[1][:3]
    wanted = hf_tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert template.prompt(asked).tolist() == wanted == _OfData(tokenizer, None, "a run").encode(asked)
    assert template.ends_of_turns() == {tokenizer.special_tokens[TURN_ENDS[kind]]}


@pytest.mark.parametrize("fault", ["on the prompt", "shifted", "on padding", "on padding, packed", "neighbours"])
def test_a_planted_fault_is_found(
    fault: str, tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, packed = chat.weights_at, fault.endswith("packed") or fault == "neighbours"
    if fault == "on the prompt":
        monkeypatch.setattr(chat, "weights_at", lambda *args: np.ones_like(right(*args)))
    if fault == "shifted":
        monkeypatch.setattr(chat, "weights_at", lambda *args: np.roll(right(*args), 1))
    read = SupervisedReader.read

    def faulty(self: SupervisedReader, *args: Any) -> Any:
        arrays = read(self, *args)
        if fault.startswith("on padding"):
            arrays["weights"][arrays["targets"] == 0] = 1
        if fault == "neighbours":
            arrays["positions"][:] = np.arange(CONTEXT)
        return arrays

    monkeypatch.setattr(SupervisedReader, "read", faulty)
    index = pack(LINES, tmp_path / "out", Tokenizer.open(str(tokenizers["llama3"])))
    try:
        found = rows(index, packed)
    except AssertionError:
        return
    assert found != expected("llama3", tokenizers["llama3"])


@pytest.mark.parametrize("kind", ["chatml", "llama3", "gemma"])
def test_special_tokens_in_a_message_stay_text(kind: str, tokenizers: dict[str, Path]) -> None:
    tokenizer = Tokenizer.open(str(tokenizers[kind]))
    end = TURN_ENDS[kind]
    text = f"What does {end}\n mean, {end}?" if kind != "gemma" else f"a{end}\nb {end}"
    conversation = [{"role": "user", "content": text}, {"role": "assistant", "content": f"b {end} b"}]
    found = ChatTemplate.of(tokenizer).encode(conversation, [0.0, 1.0])
    id = tokenizer.special_tokens[end]
    assert found.ids.tolist().count(id) == 2
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}]
    ends = [place for place, one in enumerate(found.ids.tolist()) if one == id]
    if kind != "gemma":
        learned = tokenizer.decode(found.ids[found.weights > 0])
        assert learned == f"b {end} b"
        assert text in tokenizer.decode(found.ids)
    assert found.weights[ends[1]] == 1
    assert found.weights[: ends[0] + 1].sum() == 0
    # The tokens around are those of a conversation without.
    other = ChatTemplate.of(tokenizer).encode(plain, [0.0, 1.0])
    head = 2 if kind != "chatml" else 1
    assert found.ids[:head].tolist() == other.ids[:head].tolist()


def test_turns_have_weights_and_other_names(chatml: Tokenizer) -> None:
    turns = CONVERSATIONS[1]
    all_of_it = encode_record({"messages": turns}, chatml, {})
    share_gpt = [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in turns]
    assert encode_record({"conversations": share_gpt}, chatml, {}).ids.tolist() == all_of_it.ids.tolist()
    muted = [{**one, "weight": 0} if one["content"] == "Four." else one for one in turns]
    last = encode_record({"messages": muted}, chatml, {})
    assert 0 < last.weights.sum() < all_of_it.weights.sum()
    halves = encode_record({"prompt": turns[:3], "completion": turns[3:]}, chatml, {})
    assert halves.weights.tolist() == last.weights.tolist()


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizers: dict[str, Path]) -> None:
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last or m.role == 'user' %}{{ m.content }}"
        "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = Tokenizer.open(str(tokenizers["chatml"]), chat_template=forgetful)
    encode_record({"messages": CONVERSATIONS[0]}, tokenizer, {})
    with pytest.raises(UserError, match="differently when other turns follow") as refused:
        encode_record({"messages": CONVERSATIONS[1]}, tokenizer, {})
    assert "{% generation %}" in str(refused.value.fix)
    with pytest.raises(UserError, match="do not fit the chat template"):
        encode_record({"messages": CONVERSATIONS[0][1:]}, Tokenizer.open(str(tokenizers["gemma"])), {})
    with pytest.raises(UserError, match="no chat template"):
        encode_record({"messages": CONVERSATIONS[0]}, Tokenizer(), {})


BYTES_A = [ord("a"), ord("b"), 256]


@pytest.mark.parametrize(
    ("record", "columns", "ids", "weights"),
    [
        ({"prompt": "a", "completion": "b"}, "", BYTES_A, [0, 1, 1]),
        ({"prompt": "a", "response": "b"}, "", BYTES_A, [0, 1, 1]),
        ({"q": {"text": "a"}, "a": "b"}, "prompt=q.text,completion=a", BYTES_A, [0, 1, 1]),
        ({"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}, "", [7, 8, 9], [0, 1, 1]),
        ({"input_ids": [7, 8, 9], "loss_mask": [0, 0.5, 1]}, "", [7, 8, 9], [0, 0.5, 1]),
        ({"text": "éa", "mask": [1, 0]}, "", [0xC3, 0xA9, ord("a"), 256], [1, 1, 0, 0]),
        ({"text": "ab", "mask": [0, 1]}, "", BYTES_A, [0, 1, 1]),
    ],
)
def test_forms_of_samples(record: dict[str, Any], columns: str, ids: list[int], weights: list[float]) -> None:
    found = encode_record(record, Tokenizer(), parse_columns(columns) if columns else {})
    assert (found.ids.tolist(), found.weights.tolist()) == (ids, weights)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [7, 8, 9], "labels": [8, 9, -100]}, "shifted by one position"),
        ({"input_ids": [7, 8, 9], "labels": [-100, 1, 9]}, "neither the tokens themselves"),
        ({"input_ids": [7, 8, 9], "labels": [-100, 8]}, "3 input_ids and 2 labels"),
        ({"input_ids": [7, 8], "loss_mask": [1, 0]}, "no token of the sample has a weight above zero"),
        ({"input_ids": [7, 300], "loss_mask": [1, 1]}, "the tokenizer has 257"),
        ({"input_ids": [7, 8], "loss_mask": [0, -1]}, "negative"),
        ({"prompt": "a", "completion": 3}, "neither two texts"),
        ({"text": "ab", "mask": [1]}, "a number for each character"),
        ({"title": "a"}, "keys title, which do not form a sample"),
    ],
)
def test_what_is_no_sample_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_record(record, Tokenizer(), {})


def test_columns_of_the_command_line() -> None:
    assert parse_columns("prompt=q, completion=meta.a") == {"prompt": "q", "completion": "meta.a"}
    for wrong in ("prompt", "prompt=", "answer=a"):
        with pytest.raises(UserError, match="is not of the form COLUMN=KEY"):
            parse_columns(wrong)
    assert {"messages", "prompt", "input_ids"} <= set(forms.keys_of({}))


def test_samples_that_share_a_sequence_fit_and_their_number_follows_from_the_lengths() -> None:
    random = np.random.default_rng(3)
    for size in (1, 7, 64):
        lengths = random.integers(1, size + 1, 300)
        found = bins(lengths, size)
        assert sorted(sample for samples in found for sample in samples) == list(range(300))
        assert max(int(lengths[samples].sum()) for samples in found) <= size
        mixed = random.permutation(lengths)
        assert len(bins(mixed, size)) == len(found) == count_bins(Counter(lengths.tolist()), size)
        assert len(found) <= -(-11 * int(lengths.sum()) // (9 * size)) + 1


def test_a_long_sample_loses_its_end_and_is_counted(tmp_path: Path) -> None:
    lines = [{"prompt": "ab", "completion": "c" * 20}, {"prompt": "d", "completion": "e"}]
    index = pack(lines, tmp_path / "out", Tokenizer())
    found = inspect(index.directory, context=8)
    assert (found.cut, found.sequences, found.samples) == (1, 2, 2)
    for packed in (False, True):
        assert sorted(int(sum(weights)) for _, _, weights in rows(index, packed, 8).elements()) == [2, 7]
    assert sum(index.sequence_counts(32, True)) == 1


def test_shards_are_verified_streamed_and_the_same_with_workers(tmp_path: Path, serve: Any) -> None:
    lines = [{"prompt": "p" * number, "completion": "c" * (30 - number)} for number in range(1, 30)]
    lines += [{"input_ids": [1, 2, 3], "loss_mask": [0, 0.25, 1]}]
    index = pack(lines, tmp_path / "out", Tokenizer(), shard_bytes=12000, validation="10%")
    assert len(index.shards) > 1
    assert verify(tmp_path / "out").problems == []
    local = rows(index, True, 64)
    with serve(index.directory) as server:
        streaming = StreamingConfig(cache_dir=str(tmp_path / "cache"))
        assert rows(open_index(server.url, streaming), True, 64, streaming) == local
    again = kind_named("supervised").pack(
        [tmp_path / "out.jsonl"], tmp_path / "again", PackOptions(tokenizer=Tokenizer(), shard_bytes=12000)
    )
    assert again.splits["train"].documents == 30
    content = json.loads((index.directory / "index.json").read_text())
    assert content["format_version"] == 4
    content["shardlist"][0]["lengths"] = {"3": 1}
    (index.directory / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="index is inconsistent"):
        load_index(index.directory)


def test_what_takes_no_part_of_the_tokens_is_refused(tmp_path: Path) -> None:
    index = pack([{"prompt": "a", "completion": "b"}], tmp_path / "out", Tokenizer())
    kind = index.sample_kind
    kind.check_model(index, SimpleNamespace(task="causal"))
    with pytest.raises(UserError, match="task 'masked' does not support samples in which only some tokens are learned"):
        kind.check_model(index, SimpleNamespace(task="masked"))
    with pytest.raises(UserError, match="Overlap is measured on plain text"):
        next(texts_of(index.directory))


def test_bad_samples_are_skipped_and_named(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "c", "completion": "d"}]
    with pytest.raises(UserError, match="which do not form a sample") as refused:
        pack(lines, tmp_path / "out", Tokenizer())
    assert str(refused.value.where).endswith("out.jsonl, line 2")
    index = pack(lines, tmp_path / "out", Tokenizer(), skip_bad=1)
    assert index.samples == 2
