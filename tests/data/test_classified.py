"""Texts with a class: from objects as people have them to batches, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigtrain.config import UserError
from bigtrain.data.index import load_index
from bigtrain.data.inspect import inspect
from bigtrain.data.kind import kind_named
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import FixedOrder
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.summary import PackSummary
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.families.bert_classifier import Config

ROWS = [(f"text {number} of {name}", name) for number in range(7) for name in ("sea", "air", "land")]


def pack(rows: list[dict[str, Any]], place: Path, **options: Any) -> PackSummary:
    file = place.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, rows)))
    options = {"tokenizer": Tokenizer.open("bytes"), **options}
    return kind_named("classified").pack([file], place, PackOptions(**options))


def batch_of(place: Path, context: int) -> dict[str, np.ndarray]:
    index = load_index(place)
    index.check("always")
    with Loader(index, FixedOrder(index.sequence_counts(context)), batch_size=index.samples, context=context) as loader:
        return dict(loader.batch(0).micro_batches[0])


@pytest.mark.parametrize("numbered", [False, True])
def test_objects_become_texts_with_a_class(tmp_path: Path, numbered: bool) -> None:
    names = ["air", "land", "sea"]
    rows = [{"meta": {"body": text}, "y": names.index(name) if numbered else name} for text, name in ROWS]
    pack(rows, tmp_path / "out", columns={"text": "meta.body", "label": "y"})
    index = load_index(tmp_path / "out" / "train")
    assert (index.classes, index.class_names) == (3, None if numbered else ("air", "land", "sea"))
    assert kind_named("classified").cut(index, 12) == sum(len(text) > 12 for text, _ in ROWS)
    batch = batch_of(tmp_path / "out" / "train", 12)
    found = set()
    for tokens, length, label in zip(batch["tokens"], batch["lengths"], batch["labels"], strict=True):
        assert not tokens[length:].any()
        found.add((bytes(tokens[:length].astype(np.uint8)).decode(), names[label]))
    assert found == {(text[:12], name) for text, name in ROWS}
    assert batch["weights"].tolist() == [1.0] * len(ROWS)
    assert inspect(index.directory, context=12).padding == 12 * len(ROWS) - batch["lengths"].sum()


def test_validation_follows_the_classes_of_training(tmp_path: Path) -> None:
    rows = [{"text": text, "label": name} for text, name in ROWS]
    pack(rows, tmp_path / "all", validation="20%")
    pack([row for row in rows if row["label"] != "air"], tmp_path / "fewer")
    train, held_out, other = (load_index(tmp_path / place) for place in ("all/train", "all/validation", "fewer/train"))
    train.require_same_tokens(held_out)
    with pytest.raises(UserError, match="class 0 is 'land' in one directory and 'air' in the other"):
        train.require_same_tokens(other)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"text": " ", "label": "sea"}, "no text under 'text'"),
        ({"text": "a", "label": None}, "no class under 'label'"),
        ({"text": "a", "label": -1}, "no class under 'label'"),
        ({"text": "a", "label": True}, "no class under 'label'"),
        ({"label": "sea"}, "no text under 'text'"),
    ],
)
def test_a_bad_object_is_named_or_passed_over_and_counted(tmp_path: Path, bad: dict[str, Any], said: str) -> None:
    rows = [{"text": text, "label": name} for text, name in ROWS]
    with pytest.raises(UserError, match=said) as caught:
        pack([*rows, bad], tmp_path / "out")
    assert f"line {len(rows) + 1}" in str(caught.value)
    summary = pack([*rows, bad], tmp_path / "out", skip_bad=1)
    assert (summary.splits["train"].documents, len(summary.passed.bad)) == (len(rows), 1)


def test_names_and_numbers_are_not_mixed_and_the_model_knows_all_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the label is 1, but that of other texts is 'sea'"):
        pack([{"text": "a", "label": "sea"}, {"text": "b", "label": 1}], tmp_path / "mixed")
    pack([{"text": text, "label": name} for text, name in ROWS], tmp_path / "out")
    index = load_index(tmp_path / "out" / "train")
    kind_named("classified").check_model(index, Config(vocabulary=257, context=8))
    with pytest.raises(UserError, match=r"257 different tokens, but model\.vocabulary is 256"):
        kind_named("classified").check_model(index, Config(vocabulary=256, context=8))
