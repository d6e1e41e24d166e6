"""Requests scored by log-likelihood: as transformers scores them one by one, at every layout."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from bigtrain.checkpoint.huggingface import import_hf
from bigtrain.config import UserError
from bigtrain.data.encoding.learned import train_bpe
from bigtrain.data.formats.documents import documents
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.testing.ranks import RankPool
from bigtrain.training.evaluate import Request, measure
from bigtrain.training.requests import Task, read_requests
from bigtrain.training.tasks import encode_pair

CONTEXT = 24
SAME = 1e-4
"""Absolute, of log-likelihoods in nats in FP32."""
REQUESTS = [
    {"context": "The sky is", "continuations": [" blue", " a very old shoe", " \u00fcber"], "gold": 0},
    {"context": "Seven and one are ", "continuations": ["eight", "nine"], "gold": 1},
    {"context": "", "continuations": ["Yes", "No, never"], "gold": 1, "task": "empty"},
    {"context": "A context that is much longer than the model's own:", "continuations": [" b", " c"], "gold": 0},
    {"context": "x", "continuations": ["y" * 40, "z"], "gold": 1, "task": "long"},
]
OLMO = [
    {"context": "Seven and one are ", "continuations": ["eight", "nine of them", "\u00fcber"], "label": 1},
    {"context": "Question: what?\nAnswer:", "continuations": [" b"], "label": None},
    {"context": "A context that is much longer than the model's own:", "continuations": [" b", " cc"], "label": 0},
]
"""As OLMo's in-loop evaluation has them: a line for each continuation."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"layout": {"tp": 2}}),
    "cp2": (2, {"layout": {"cp": 2}}),
    "pp2": (2, {"layout": {"pp": 2, "micro_size": 3}}),
}


def alone(model: Any, context: str, continuation: str) -> float:
    """The log-likelihood of the bytes of a continuation; an independent writing of the rule."""
    stripped = context.rstrip()
    ids = [257 - 1] if not context else []
    ids += list((context + continuation).encode())
    counted = len((context[len(stripped) :] + continuation).encode())
    ids = ids[-CONTEXT - 1 :]
    counted = min(counted, CONTEXT)
    with torch.no_grad():
        found = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    targets = torch.tensor(ids[1:])
    return float(found[torch.arange(len(targets)), targets][-counted:].sum())


def write_olmo(file: Path) -> Path:
    lines = [
        {
            "request_type": "loglikelihood", "doc": {}, "doc_id": document, "idx": number, "label": one["label"],
            "request": {"context": one["context"], "continuation": text},
        }
        for document, one in enumerate(OLMO)
        for number, text in enumerate(one["continuations"])
    ]  # fmt: skip
    lines.append({**lines[0], "doc_id": 1_000_000})
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return file


def by_olmo(model: Any) -> dict[str, float]:
    """The metrics of olmo_eval/metrics.py that have a name here: acc, len_norm and bpb, of version 2."""
    rows = []
    for one in OLMO:
        gold, values = one["label"] or 0, []
        for text in one["continuations"]:
            context, continuation = list(one["context"].encode()), list(text.encode())
            query = (context + continuation[:-1])[-CONTEXT:]
            with torch.no_grad():
                logs = model(torch.tensor([query])).logits[0].double().log_softmax(-1)[-len(continuation) :]
            values.append(float(logs.gather(1, torch.tensor(continuation)[:, None]).sum()))
        lengths = [(1, len(text), len(text.encode())) for text in one["continuations"]]
        right = [float(max(range(len(values)), key=lambda n: values[n] / lengths[n][by]) == gold) for by in range(3)]
        rows.append([*right, -values[gold] / lengths[gold][2] / math.log(2), float(len(OLMO))])
    keys = ("accuracy", "accuracy_per_character", "accuracy_per_byte", "bits_per_byte", "requests")
    return dict(zip(keys, (sum(column) / len(rows) for column in zip(*rows, strict=True)), strict=True))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(6)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=257, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    path = tmp_path_factory.mktemp("weights") / "hf"
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_at_a_layout_are_those_of_requests_one_by_one(
    layout: str, weights: Path, text_shards: Path, tmp_path: Path, ranks: RankPool
) -> None:
    step, model = import_hf(weights, tmp_path / "native")
    count, sections = LAYOUTS[layout]
    config, file = tmp_path / "config.yaml", tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, REQUESTS)))
    written = {
        "name": "evaluation",
        "model": model,
        "data": {"train": str(text_shards / "train")},
        "batch": {"size": 4},
        "duration": "1 steps",
        "precision": "fp32",
        "init": {"source": f"{tmp_path / 'native'}@{step}"},
        **sections,
    }
    config.write_text(yaml.safe_dump(written))
    sets = {"held out": str(text_shards / "validation")}
    files = (str(file), str(write_olmo(tmp_path / "arc" / "rc_5shot" / "requests.jsonl.gz")))
    found = ranks.run(measure, Request(str(config), sets, 257, batches=1, tasks=files), ranks=count)
    assert all(one == found[0] for one in found)

    torch.set_num_threads(1)
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(weights)
    expected: dict[str, list[tuple[float, ...]]] = {}
    for request in REQUESTS:
        texts, gold = request["continuations"], request["gold"]
        values = [alone(hf_model, request["context"], text) for text in texts]
        right = [
            float(max(range(len(texts)), key=lambda n: values[n] / lengths[n]) == gold)
            for lengths in ([1] * len(texts), [len(text) for text in texts], [len(text.encode()) for text in texts])
        ]
        bits = -values[gold] / len(texts[gold].encode()) / math.log(2)
        expected.setdefault(request.get("task", "requests"), []).append((*right, bits, 1.0))
    for task, rows in expected.items():
        *means, bits, _ = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        scores = found[0][f"task {task}"]
        keys = ("accuracy", "accuracy_per_character", "accuracy_per_byte")
        assert [scores[key] for key in keys] == pytest.approx(means)
        assert scores["bits_per_byte"] == pytest.approx(bits, abs=SAME)
        assert scores["requests"] == len(rows)
    scores = found[0]["task arc_rc_5shot"]
    assert scores == pytest.approx(by_olmo(hf_model), abs=SAME)


def test_spaces_between_context_and_continuation_belong_to_the_continuation() -> None:
    tokenizer = Tokenizer.open("bytes")
    assert encode_pair(tokenizer, "ab ", "c") == encode_pair(tokenizer, "ab", " c") == ([97, 98, 32, 99], 2)
    assert encode_pair(tokenizer, "", "c") == ([tokenizer.eot, 99], 1)


def test_a_token_over_the_boundary_leaves_the_context_its_own(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("in in in in ion ion " * 50)
    train_bpe(documents([tmp_path / "text.txt"]), 265, tmp_path / "bpe.json")
    tokenizer = Tokenizer.open(str(tmp_path / "bpe.json"))
    context, whole = ([int(one) for one in tokenizer.encode(text)] for text in ("in i", "in in in"))
    assert whole[: len(context)] != context, "no token reaches over the boundary: the test lost its point"
    tokens, count = encode_pair(tokenizer, "in i", "n in")
    assert tokens == context + whole[len(context) :]
    assert count == len(whole) - len(context) > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a", "gold": 0}', "not a request"),
        ('{"context": "a", "continuations": ["b"], "gold": 1}', "gold is 1"),
        ('{"context": "a", "continuations": [""], "gold": 0}', "not empty"),
        ("[]", "not a request"),
    ],
)
def test_a_line_that_is_no_request_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    good = {"context": "a", "continuations": ["b", "c"], "gold": 1}
    file.write_text(json.dumps(good) + "\n" + line)
    with pytest.raises(UserError, match=message) as refused:
        read_requests(file)
    assert str(refused.value.where).endswith(":2")
    file.write_text(json.dumps(good))
    assert read_requests(file) == [Task("a", ("b", "c"), 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"request_type": "generate_until"}, "'generate_until'"), ({"idx": "a"}, "not a request"), ({"label": 7}, "gold"),
     ({"request": {"context": "a"}}, "must be texts")],
)  # fmt: skip
def test_a_line_of_olmo_s_that_is_no_request_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    line = {
        "request_type": "loglikelihood", "doc_id": 0, "idx": 0, "label": 0,
        "request": {"context": "a", "continuation": " b"},
    }  # fmt: skip
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(line))
    assert read_requests(file) == [Task("a", (" b",), 0, "mine", apart=True)]
    file.write_text(json.dumps({**line, **change}))
    with pytest.raises(UserError, match=message) as refused:
        read_requests(file)
    assert str(refused.value.where).endswith(":1")
