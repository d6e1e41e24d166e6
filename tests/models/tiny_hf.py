"""Tiny models of transformers, one of each kind that learns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.models.families.hf import Config
from bigtrain.models.huggingface import HfTensor

VOCABULARY, CONTEXT, MASK_TOKEN = 61, 16, 63
TASKS = {"bert": "masked", "gpt2": "causal", "llama": "causal", "qwen3": "causal", "t5": "seq2seq"}


def make(kind: str, path: Path) -> Path:
    """A tiny model of random weights in `path`, its dropouts as transformers sets them."""
    import transformers as hf

    torch.manual_seed(1)
    same: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = {**same, "num_key_value_heads": 2, "intermediate_size": 48}
    positions = {"max_position_embeddings": 32}
    if kind == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**same, **positions, intermediate_size=48))
    elif kind == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))
    elif kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**decoder, **positions))
    elif kind == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**decoder, **positions, head_dim=8, tie_word_embeddings=True))
    else:
        shape = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        model = hf.T5ForConditionalGeneration(hf.T5Config(**shape, decoder_start_token_id=0))
    model.save_pretrained(path)
    return path


def config_of(path: Path) -> Config:
    """The section `model` of what `make` wrote."""
    task: Any = TASKS[path.name]
    return Config(hf=str(path), task=task, context=CONTEXT, masked=0.3, mask_token=MASK_TOKEN)


def from_hf(names: Mapping[str, HfTensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a Hugging Face state dict to bigtrain's names and layouts. Tensors may share memory with `state`."""
    native = {}
    for name, source in names.items():
        tensor = torch.cat([state[one] for one in source.names]) if source.below else state[source.name]
        tensor = tensor.t() if source.transposed else tensor
        index, count = source.part
        native[name] = tensor[: len(tensor) - len(source.padding)].chunk(count)[index].contiguous()
    return native
