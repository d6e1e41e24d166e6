"""Conversations, three chat templates in wide use, and tokenizers that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red, or a deep  blue."}],
    [
        {"role": "user", "content": "two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": " And three\n\nmore? "},
        {"role": "assistant", "content": "Seven.\nÜber-seven!"},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [
        {"role": "user", "content": "Count far, please."},
        {"role": "assistant", "content": " ".join(str(number) for number in range(14))},
    ],
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
TEMPLATES: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "gemma": (
        GEMMA,
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        {"bos_token": "<bos>", "eos_token": "<eos>"},
    ),
    "marked": (MARKED, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}),
}
"""Template, special tokens, and names of tokens in tokenizer_config.json."""
TURN_ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "marked": "<|im_end|>"}


def write_tokenizer(kind: str, directory: Path) -> Path:
    """A small BPE with a template, as a directory that transformers reads too."""
    template, special, names = TEMPLATES[kind]
    texts = [message["content"] for conversation in CONVERSATIONS for message in conversation] * 3
    backend = Tokenizer(models.BPE())
    if kind == "gemma":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        alphabet = sorted({*"".join(texts), "▁", "\n"} - {" "})
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*texts, "user model assistant system"], trainer)
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def reference(kind: str, directory: Path, conversation: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens by transformers, and a one for each that the assistant writes, its end of turn included."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)

    def tokens(messages: list[dict[str, str]], prompt: bool) -> list[int]:
        return list(
            tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
        )

    ids = tokens(conversation, False)
    mask = [0] * len(ids)
    end = tokenizer.convert_tokens_to_ids(TURN_ENDS[kind])
    for turn, message in enumerate(conversation):
        if message["role"] == "assistant":
            begin = len(tokens(conversation[:turn], True))
            stop = ids.index(end, begin) + 1
            mask[begin:stop] = [1] * (stop - begin)
    return ids, mask
