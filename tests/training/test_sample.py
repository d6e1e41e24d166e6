"""Texts of a Hugging Face directory: as transformers writes them, one or many, and in a conversation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bigtrain.api.models import load
from bigtrain.config import UserError
from bigtrain.models.sampling import Choice
from bigtrain.training.sample import Prompt, Writer, read_prompts, writer_at, writer_of_directory

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
GREEDY = {"tokens": 24, "choice": Choice(0)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of bytes and a chat template."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: place for place, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=SPECIAL[1:], chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(path)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=len(tokenizer),
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def writer(directory: Path) -> Writer:
    return writer_of_directory(directory)


def expected(directory: Path, prompt: Prompt, tokens: int = 24) -> str:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )  # fmt: skip
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    new = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def test_prompts_of_several_lengths_get_the_texts_of_each_alone(directory: Path, writer: Writer) -> None:
    prompts: list[Prompt] = ["It was", "a", [{"role": "user", "content": "Hello there"}]]
    assert writer.write(prompts, **GREEDY) == [expected(directory, prompt) for prompt in prompts]


def test_a_text_ends_before_the_first_text_that_stops_it(writer: Writer) -> None:
    (whole,) = writer.write(["It was"], **GREEDY)
    stop = whole[5:7]
    assert writer.write(["It was"], stop=["not in there", stop], **GREEDY) == [whole[: whole.index(stop)]]


def test_prompts_come_from_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert read_prompts(file) == ["a", [{"role": "user", "content": "b"}]]
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="not a JSON object with a prompt") as refused:
        read_prompts(file)
    assert str(refused.value.where).endswith(":2")


def test_imported_weights_go_wherever_those_of_their_directory_go(
    directory: Path, writer: Writer, tmp_path: Path, bigtrain_here: Callable[..., Any]
) -> None:
    done = bigtrain_here("checkpoint", "import", directory, "--out", "taken")
    assert done.returncode == 0, done.stderr
    chat: Prompt = [{"role": "user", "content": "Hello there"}]
    taken = writer_at(str(tmp_path / "taken"), tmp_path)
    answer = writer.write([chat], **GREEDY)
    assert taken.write([chat], **GREEDY) == answer
    assert (taken.ends, taken.start) == (writer.ends, writer.start)

    tokens = torch.arange(40)[None] % 97
    for place in (directory, tmp_path / "taken"):
        model = load(place)
        assert model.tokenizer is not None
        with torch.no_grad():
            assert torch.allclose(model.logits({"tokens": tokens}), writer.model(tokens).logits, atol=1e-4)

    assert model.generate("It was", tokens=4, temperature=0) == "It was" + expected(directory, "It was", tokens=4)
    done = bigtrain_here("checkpoint", "export", "taken@0", "--format", "hf", "--out", "back")
    assert done.returncode == 0, done.stderr
    again, first = (transformers.AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "back", directory))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert again.config.eos_token_id == first.config.eos_token_id
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    for command in ("list", "verify"):
        assert bigtrain_here("checkpoint", command, "taken").returncode == 0


def test_a_command_for_runs_alone_says_what_weights_go_with(
    directory: Path, tmp_path: Path, bigtrain_here: Callable[..., Any]
) -> None:
    done = bigtrain_here("checkpoint", "export", directory, "--out", "out")
    assert done.returncode == 2
    assert "holds Hugging Face weights, not a run" in done.stderr
    (tmp_path / "other/checkpoints").mkdir(parents=True)
    assert "imported checkpoint, not a run" in bigtrain_here("report", "other").stderr
    assert "does not say which model" in bigtrain_here("sample", "other").stderr
