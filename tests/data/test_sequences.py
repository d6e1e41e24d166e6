from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bigtrain.data.index import ShardIndex
from bigtrain.data.kinds.tokens import Arrays, TokenReader


@pytest.fixture(autouse=True, params=[0, 1 << 40], ids=["copied", "gathered"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.data.kinds.tokens.LONG_DOCUMENT", request.param)


def streams(index: ShardIndex, texts: list[str]) -> list[list[tuple[int, int, int]]]:
    """(token, document of the shard, place in the document) of each shard's stream, from the texts alone."""
    documents = [[*text.encode(), 256] for text in texts]
    result = []
    for shard in index.shards:
        taken, documents = documents[: shard.nsamples], documents[shard.nsamples :]
        result.append([(token, number, place) for number, doc in enumerate(taken) for place, token in enumerate(doc)])
    return result


def everything(index: ShardIndex, context: int, document_mask: bool) -> tuple[np.ndarray, np.ndarray, Arrays]:
    counts = index.sequence_counts(context)
    shards = np.repeat(np.arange(len(counts)), counts)
    indices = np.concatenate([np.arange(count) for count in counts])
    mixed = np.random.default_rng(0).permutation(len(shards))
    shards, indices = shards[mixed], indices[mixed]
    return shards, indices, TokenReader(index, context, document_mask, open_shards=3).read(shards, indices)


@pytest.mark.parametrize("context", [1, 5, 64, 1000, 5000])
def test_sequences_are_segments_of_the_shards_stream(packed: ShardIndex, texts: list[str], context: int) -> None:
    expected = streams(packed, texts)
    shards, indices, arrays = everything(packed, context, document_mask=False)
    for row, (shard, index) in enumerate(zip(shards, indices, strict=True)):
        part = [token for token, _, _ in expected[shard][index * context : index * context + context + 1]]
        count = len(part) - 1
        assert arrays["tokens"][row, :count].tolist() == part[:-1]
        assert arrays["targets"][row, :count].tolist() == part[1:]
        assert arrays["weights"][row].tolist() == [1.0] * count + [0.0] * (context - count)
    assert arrays["weights"].sum() == sum(shard.tokens - 1 for shard in packed.shards)
    assert [arrays[name].dtype.name for name in ("tokens", "targets", "weights")] == ["int64", "int64", "float32"]


@pytest.mark.parametrize("context", [5, 64, 5000])
def test_the_document_mask_keeps_documents_apart(packed: ShardIndex, texts: list[str], context: int) -> None:
    expected = streams(packed, texts)
    shards, indices, arrays = everything(packed, context, document_mask=True)
    plain = everything(packed, context, document_mask=False)[2]
    assert np.array_equal(arrays["tokens"], plain["tokens"])
    for row, (shard, index) in enumerate(zip(shards, indices, strict=True)):
        part = expected[shard][index * context : index * context + context + 1]
        first_document, first_place = part[0][1], part[0][2]
        inputs = part[:context]
        numbers = [document - first_document for _, document, _ in inputs]
        places = [place - (first_place if document == first_document else 0) for _, document, place in inputs]
        padding = context - len(inputs)
        padding_number = numbers[-1] + 1
        assert arrays["documents"][row].tolist() == numbers + [padding_number] * padding
        assert arrays["positions"][row].tolist() == places + list(range(padding))
        same = [float(left[1] == right[1]) for left, right in pairwise(part)]
        assert arrays["weights"][row].tolist() == same + [0.0] * (context - len(same))
    assert arrays["documents"].dtype == np.int32
    assert arrays["positions"].dtype == np.int64


def test_under_the_mask_every_token_but_the_first_of_a_document_is_a_target_once(
    packed: ShardIndex, texts: list[str]
) -> None:
    arrays = everything(packed, 7, document_mask=True)[2]
    assert arrays["weights"].sum() == sum(len(text.encode()) for text in texts)


def test_sample_ids_name_the_document_and_offset_of_the_first_token(packed: ShardIndex, texts: list[str]) -> None:
    expected, reader = streams(packed, texts), TokenReader(packed, 50)
    for shard, count in enumerate(packed.sequence_counts(50)):
        ids = reader.sample_ids("train", np.full(count, shard), np.arange(count))
        for index, name in enumerate(ids):
            _, document, place = expected[shard][index * 50]
            assert name == f"train/shard-{shard:06d}/{document}:{place}"


def test_blanks_have_the_names_and_types_of_sequences(packed: ShardIndex) -> None:
    for mask in (False, True):
        reader = TokenReader(packed, 8, mask)
        read, blank = reader.read(np.asarray([0]), np.asarray([0])), reader.blank(3)
        assert {name: value.dtype for name, value in read.items()} == {n: v.dtype for n, v in blank.items()}
        assert {value.shape for value in blank.values()} == {(3, 8)}
        assert blank["weights"].sum() == 0
