"""Llama (Touvron et al. 2023, Dubey et al. 2024): RMSNorm, SwiGLU, rotary positions, no bias."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig
from bigtrain.models.huggingface import HfTensor, require

PARTS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
"""Modules of a layer, and their names in transformers' Llama and its descendants."""


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of Llama's shape; every key can be overridden."""

    arch: Literal["llama"] = "llama"
    mlp: Activation = "swiglu"

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' LlamaForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that Llama does not have.
        """
        check_shape(self, "Llama")
        return names_in_llama(self, PARTS)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a LlamaForCausalLM of this shape."""
        facts = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
        return facts | config_of_llama(self, rows)

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        require(hf, {"mlp_bias": False})
        return {"arch": "llama", **keys_of_llama(hf)}


def check_shape(config: DecoderConfig, name: str, free: Collection[str] = (), **parts: Any) -> None:
    """Check that a decoder still has a shape that transformers' model of its family supports.

    Args:
        name: Name of the family, for the message.
        free: Keys that transformers supports at any value.
        parts: Values that keys must have, where they differ from Llama's.

    Raises:
        ValueError: A key has a value that transformers' model does not support.
    """
    defaults = {key: DecoderConfig.model_fields[key].default for key in DecoderConfig.later_keys - {"adapter", "mup"}}
    llama = {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": False, "qk_norm": False}
    for key, value in {**defaults, **llama, **parts}.items():
        own = getattr(config, key)
        if key not in free and own != value:
            raise ValueError(f"transformers' {name} supports only model.{key} {value!r}, not {own!r}")


def names_in_llama(config: DecoderConfig, parts: dict[str, str]) -> dict[str, HfTensor]:
    """Position of each parameter in the state dict of a Llama-like model of transformers, by qualified name.

    Args:
        parts: Modules of a layer, and their names in transformers.
    """
    names = {"embedding.weight": HfTensor("model.embed_tokens.weight")}
    for layer in range(config.layers):
        for native, hf in parts.items():
            names[f"layers.{layer}.{native}.weight"] = HfTensor(f"model.layers.{layer}.{hf}.weight")
    names["norm.weight"] = HfTensor("model.norm.weight")
    if not config.tied:
        names["head.weight"] = HfTensor("lm_head.weight")
    return names


def config_of_llama(config: DecoderConfig, rows: int) -> dict[str, Any]:
    """The keys that Llama and its descendants share in config.json; rotary keys suit all versions of transformers."""
    rotary = rotary_of(config)
    return {
        "vocab_size": rows,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.width_of_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.position_count,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        # If these keys are absent, some classes of transformers use the token ids of their original vocabulary.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rotary,
        "rope_parameters": {**rotary, "rope_theta": config.rope_theta},
    }


def rotary_of(config: DecoderConfig) -> dict[str, Any]:
    """The scaling of rotary wavelengths, as keys of config.json."""
    rotary: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rotary = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    return rotary


def keys_of_llama(hf: dict[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """Convert the config.json of Llama or a descendant to keys of `model`.

    Args:
        theta: The rotary base, if config.json has none.

    Raises:
        ValueError: The config.json has a bias, another activation, or another rule of rotary scaling.
    """
    require(hf, {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False})
    rotary = hf.get("rope_parameters") or {}
    rotary = rotary.get("full_attention", rotary)
    scaling = hf.get("rope_scaling") or {key: rotary[key] for key in rotary if key != "rope_theta"}
    heads = hf.get("num_attention_heads", 32)
    positions = hf.get("max_position_embeddings", 2048)
    keys = {
        "layers": hf.get("num_hidden_layers", 32),
        "width": hf.get("hidden_size", 4096),
        "heads": heads,
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "mlp_width": hf.get("intermediate_size", 11008),
        "context": positions,
        "max_positions": positions,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_theta": float(hf.get("rope_theta") or rotary.get("rope_theta") or theta),
        "tied": hf.get("tie_word_embeddings", False),
    }
    if hf.get("head_dim") is not None:
        keys["head_width"] = hf["head_dim"]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "llama3":
        keys["rope_scaling"] = {
            "factor": scaling["factor"],
            "low_freq_factor": scaling["low_freq_factor"],
            "high_freq_factor": scaling["high_freq_factor"],
            "original_context": scaling["original_max_position_embeddings"],
        }
    elif kind != "default":
        raise ValueError(
            f"its rotary wavelengths (rope_parameters, rope_scaling) are scaled by the rule {kind!r}, but bigtrain "
            "supports only llama3"
        )
    return keys


def full_attention_every(types: list[str]) -> int | None:
    """The key `full_attention_every` that corresponds to the `layer_types` of a config.json.

    Raises:
        ValueError: The layers with full attention are not every n-th layer.
    """
    full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    every = full[0] + 1 if full else None
    expected = [
        "full_attention" if every and (layer + 1) % every == 0 else "sliding_attention" for layer in range(len(types))
    ]
    if types != expected:
        raise ValueError(
            f"its config.json says layer_types: {types}, but bigtrain supports full attention only in every n-th layer"
        )
    return every


def layer_types(config: DecoderConfig) -> list[str]:
    """The `layer_types` of a decoder for config.json: the inverse of `full_attention_every`."""
    windowed = config.windowed_layers
    return ["sliding_attention" if layer in windowed else "full_attention" for layer in range(config.layers)]
