"""Direct preference optimisation: losses and gradients of a plain reference, on one rank and on two."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bigtrain.checkpoint.huggingface import read_hf
from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.data.encoding.pairs import TextPair, read_pair
from bigtrain.data.formats.tar import samples
from bigtrain.data.index import load_index
from bigtrain.data.inspect import inspect
from bigtrain.data.kind import kind_named
from bigtrain.data.kinds.preferences import PreferenceReader
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.check import check_model
from bigtrain.models.config import FAMILIES
from bigtrain.models.hf_files import HfFiles
from bigtrain.models.init import initialise
from bigtrain.run import ExitCode, RunDirectory, load_config
from bigtrain.storage import read_lines
from bigtrain.testing.equivalence import How, What, deviations, record
from bigtrain.testing.ranks import RankPool
from bigtrain.training.export import export_run
from bigtrain.training.prepare import prepare
from tests.data.chats import TURN_ENDS, write_tokenizer
from tests.data.chats import reference as conversation_of

CONTEXT, VOCAB, BETA = 24, 61, 0.3
CLOSE = 1e-5
"""Relative, in FP32: sums over tokens in another order."""
POLICY = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56, "context": CONTEXT}
LORA = {"name": "lora", "rank": 3, "targets": ["query", "down"]}
MODELS = {"whole": POLICY, "adapter": {**POLICY, "adapter": LORA}}


def model(policy: dict[str, Any]) -> dict[str, Any]:
    return {"arch": "dpo", "policy": policy, "beta": BETA}


def likelihood(decoder: Any, batch: dict[str, Tensor], side: int) -> Tensor:
    """Sums of log-likelihoods of the answers; an independent writing of the rule."""
    tokens, targets, weights = (batch[name][:, side] for name in ("tokens", "targets", "weights"))
    logs = decoder.logits({"tokens": tokens}).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return (logs * (weights > 0)).sum(1)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_the_plain_formula(kind: str) -> None:
    config = FAMILIES["dpo"](**model(MODELS[kind]))
    check_model(config, VOCAB)
    native = config.build(VOCAB)
    initialise(native, 3)
    generator = torch.Generator().manual_seed(1)
    plain = FAMILIES["llama"](**MODELS[kind]).build(VOCAB)
    reference = FAMILIES["llama"](**POLICY).build(VOCAB)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        state = dict(native.named_parameters())
        plain.load_state_dict({name: state[name] for name, _ in plain.named_parameters()})
        prefix = "reference." if kind == "whole" else ""
        reference.load_state_dict({name: state[prefix + name] for name, _ in reference.named_parameters()})
    random = np.random.default_rng(7)
    arrays = kind_named("preferences").example_batch(config, VOCAB, 3, random)
    arrays["weights"][2] = 0
    batch = {name: torch.as_tensor(array) for name, array in arrays.items()}
    result = native(batch)
    result.loss.backward()

    with torch.no_grad():
        held = [likelihood(reference, batch, side) for side in (0, 1)]
    own = [likelihood(plain, batch, side) for side in (0, 1)]
    margins = BETA * ((own[0] - held[0]) - (own[1] - held[1]))
    losses = -F.logsigmoid(margins)[:2]
    losses.sum().backward()
    assert result.weight.item() == 2
    assert result.loss.item() == pytest.approx(losses.sum().item(), rel=CLOSE)
    assert (losses - losses[0]).abs().max() > 0.01, "the pairs must differ"
    gradients = {name: one.grad for name, one in plain.named_parameters() if one.requires_grad}
    found = {name: one.grad for name, one in native.named_parameters() if one.requires_grad}
    assert found.keys() == gradients.keys()
    largest = max(one.norm() for one in gradients.values())
    for name, gradient in gradients.items():
        assert (found[name] - gradient).norm() <= CLOSE * (gradient.norm() + largest), name
    with torch.no_grad():
        assert native(batch).loss.item() == pytest.approx(losses.sum().item(), rel=CLOSE)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("whole", How(2)),
        pytest.param("whole", How(2, {"tp": 2}), marks=pytest.mark.slow),
        pytest.param("adapter", How(2), marks=pytest.mark.slow),
        pytest.param("adapter", How(2, {"tp": 2, "loss_parallel": False}), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_compute_what_one_process_computes(kind: str, how: How, ranks: RankPool, tmp_path: Path) -> None:
    what = What(model(MODELS[kind]), steps=4)
    what = replace(what, optimizer={"name": "adamw", "eps": 1e-6})
    ranks.run(record, what, tmp_path, ranks=1)
    found = ranks.run(deviations, what, how, tmp_path, ranks=how.ranks)
    # A margin is a small difference of large numbers, and 0 at first; it is in the loss, which is compared.
    assert [fault for fault in found[0].faults() if not fault.startswith("metrics")] == []


PAIRS = [
    {"prompt": f"What is {n} plus 1? ", "chosen": f"It is {n + 1}.", "rejected": "I do not know, ask another."}
    for n in range(40)
]


def test_pairs_are_packed_read_and_refused(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, [*PAIRS, {"prompt": "", "chosen": "a", "rejected": "b"}])))
    options = PackOptions(tokenizer=Tokenizer.open("bytes"))
    kind = kind_named("preferences")
    kind.pack([file], tmp_path / "shards", options)
    index = load_index(tmp_path / "shards" / "train")
    assert (index.kind, index.samples) == ("preferences", 41)
    assert kind.recognises(next(iter(samples(tmp_path / "shards" / "train" / index.shards[0].url))))
    eot = index.load_tokenizer().eot

    def rows(context: int) -> set[tuple[str, str, bool]]:
        """What each side of each pair reads, what of it counts, and whether that ends the text."""
        reader, found = PreferenceReader(index, context), set()
        batch = reader.read(np.zeros(41, np.int64), np.arange(41))
        ends = [np.flatnonzero(weights)[-1] + 1 for weights in batch["weights"].reshape(82, -1)]
        assert inspect(index.directory, context).padding == 82 * context - sum(ends)
        for arrays in zip(*(batch[name].reshape(82, -1) for name in ("tokens", "targets", "weights")), strict=True):
            tokens, targets, weights = arrays
            counted = targets[weights > 0]
            read = bytes(token for token in tokens[: int(np.flatnonzero(weights)[0]) + 1] if token != eot)
            ends = bool(counted[-1] == eot)
            found.add((read.decode(), bytes(token for token in counted if token != eot).decode(), ends))
        return found

    expected = {(pair["prompt"], pair[part], True) for pair in PAIRS for part in ("chosen", "rejected")}
    assert rows(64) == expected | {("", "a", True), ("", "b", True)}
    assert kind.cut(index, 64) == 0
    short = rows(16)
    assert (" is 7 plus 1? ", "It is 8.", True)[0][-8:] in {read for read, *_ in short}
    assert ("What is 7 plus 1? "[-1:], PAIRS[0]["rejected"][:16], False) in short
    assert kind.cut(index, 16) == 40
    file.write_text(json.dumps({"prompt": "a", "chosen": "", "rejected": "b"}))
    with pytest.raises(UserError, match="not a preference"):
        kind.find([file], options)


CHATS = [
    [
        {"role": "user", "content": f"two and {number}?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": " And three\n\nmore? "},
    ]
    for number in range(3)
]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("Seven.\nÜber-seven!", "Red, or a deep  blue.")]
FORMS: dict[str, Callable[[list[dict[str, str]]], dict[str, Any]]] = {
    "explicit": lambda chat: {"prompt": chat, "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    "implicit": lambda chat: {"chosen": chat + ANSWERS[0], "rejected": chat + ANSWERS[1]},
    "both": lambda chat: {"prompt": chat, "chosen": chat + ANSWERS[0], "rejected": chat + ANSWERS[1]},
    "text beside": lambda chat: {
        "prompt": chat[0]["content"], "chosen": chat + ANSWERS[0], "rejected": chat + ANSWERS[1]
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", TURN_ENDS)
def test_the_loss_of_chats_is_that_of_transformers_with_its_chat_template(kind: str, tmp_path: Path) -> None:
    directory = write_tokenizer(kind, tmp_path / "tokenizer")
    pack_options = PackOptions(tokenizer=Tokenizer.open(str(directory)))
    samples_kind, fingerprints = kind_named("preferences"), set()
    for name, form in FORMS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(form(chat)) for chat in CHATS))
        samples_kind.pack([tmp_path / f"{name}.jsonl"], tmp_path / name, pack_options)
        fingerprints.add(load_index(tmp_path / name / "train").fingerprint)
    assert len(fingerprints) == 1, "the forms of one preference are the same tokens"
    index = load_index(tmp_path / "explicit" / "train")
    batch = PreferenceReader(index, 96).read(np.zeros(3, np.int64), np.arange(3))
    arrays = {key: torch.as_tensor(value) for key, value in batch.items()}

    torch.manual_seed(2)
    shape = transformers.LlamaConfig(
        vocab_size=index.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=56, max_position_embeddings=96, initializer_range=0.2,
    )  # fmt: skip
    policy, held = (transformers.LlamaForCausalLM(shape).eval() for _ in range(2))
    policy.save_pretrained(tmp_path / "policy")
    held.save_pretrained(tmp_path / "held")
    files = HfFiles.open(tmp_path / "policy")
    config = FAMILIES["dpo"](**model({**files.keys(), "context": 96}))
    native = config.build(index.vocab_size)
    read_hf(files, config.policy.hf_names(), {name: native.get_parameter(name) for name in config.policy.hf_names()})
    reference = native.reference
    read_hf(HfFiles.open(tmp_path / "held"), config.policy.hf_names(), dict(reference.named_parameters()))

    def likelihood_of(network: Any, conversation: list[dict[str, str]]) -> Tensor:
        ids, mask = conversation_of(kind, directory, conversation)
        first = len(ids) - mask[::-1].index(1) - 1
        while mask[first - 1]:
            first -= 1  # the last turn alone
        tokens = torch.tensor([ids])
        logs = network(tokens).logits[0, :-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        return (logs * torch.tensor(mask[1:]))[first - 1 :].sum()

    with torch.no_grad():
        losses = []
        for chat in CHATS:
            ratios = [likelihood_of(policy, chat + one) - likelihood_of(held, chat + one) for one in ANSWERS]
            losses.append(-F.logsigmoid(BETA * (ratios[0] - ratios[1])).item())
        result = native({**arrays, "keys": torch.arange(3)})
    assert max(losses) - min(losses) > 0.01, "the pairs must differ"
    assert result.weight.item() == 3
    assert result.loss.item() == pytest.approx(sum(losses), rel=CLOSE)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": ANSWERS[0], "rejected": ANSWERS[1]}, "no common beginning"),
        (
            {"prompt": CHATS[0], "chosen": ANSWERS[0] + CHATS[1], "rejected": ANSWERS[1]},
            "exactly one more turn",
        ),
        ({"prompt": CHATS[0], "chosen": ANSWERS[0], "rejected": ANSWERS[0]}, "exactly one more turn"),
        ({"prompt": CHATS[0], "chosen": CHATS[0][:1], "rejected": ANSWERS[0]}, "exactly one more turn"),
        ({"prompt": CHATS[0], "chosen": "Yes.", "rejected": "No."}, "not a preference"),
        ({"chosen": "same", "rejected": "same"}, "answer is empty"),
        ({"prompt": "a", "chosen": [{"content": "b"}], "rejected": ANSWERS[0]}, "no role"),
    ],
)
def test_what_is_no_preference_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pair(record)


def test_texts_without_a_prompt_share_their_beginning() -> None:
    assert read_pair({"chosen": "The sky is blue.", "rejected": "The sky is green."}) == TextPair(
        "The sky is", " blue.", " green."
    )


@pytest.mark.slow
def test_a_run_learns_preferences_from_weights_and_exports_the_policy(
    write_config: Callable[..., Path], bigtrain: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, rms_norm_eps=1e-5,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    options = PackOptions(tokenizer=Tokenizer.open("bytes"))
    kind_named("preferences").pack([tmp_path / "pairs.jsonl"], tmp_path / "pairs", options)
    policy = HfFiles.open(tmp_path / "base").keys()
    sections = {
        "model": model(policy), "data": {"train": str(tmp_path / "pairs" / "train")}, "batch": {"size": 8},
        "evaluation": {}, "optimizer": {"lr": 3e-3}, "checkpoint": {"every": "4 steps"}, "duration": "12 steps",
    }  # fmt: skip
    with pytest.raises(UserError, match="needs initial weights to compare with"):
        prepare(load_config(write_config(**sections)))
    path = write_config(**sections, init={"source": str(tmp_path / "base")})
    for steps in (8, 12):
        done = bigtrain("train", path, "--nproc", 2, f"duration={steps} steps")
        assert done.returncode == ExitCode.FINISHED, done.stderr
    run = RunDirectory(tmp_path / "runs" / "tiny")
    rows = list(read_lines(run.metrics))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "at first the policy is the reference"
    assert rows[-1]["loss"] < 0.5
    assert rows[-1]["reward_accuracy"] > 0.9
    state = read_tensors(run.checkpoints, 12)
    export_run(run, 12, tmp_path / "out")
    begun, exported = (load_file(tmp_path / place / "model.safetensors") for place in ("base", "out"))
    assert begun.keys() == exported.keys()
    assert torch.equal(begun["model.embed_tokens.weight"], state["reference.embedding.weight"])
    assert torch.equal(exported["model.embed_tokens.weight"], state["embedding.weight"])
    assert not torch.equal(exported["model.embed_tokens.weight"], begun["model.embed_tokens.weight"])
