"""Llama (Touvron et al. 2023, Dubey et al. 2024): RMSNorm, SwiGLU, rotary positions, no bias."""

from __future__ import annotations

from typing import Literal

from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.models.huggingface import HfTensor


class Config(DecoderConfig):
    """A decoder of Llama's shape; every key can be overridden."""

    arch: Literal["llama"] = "llama"
    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "swiglu"

    def hf_names(self) -> dict[str, HfTensor]:
        """Qualified names and their places in the state dict of transformers' LlamaForCausalLM.

        Raises:
            ValueError: The shape was overridden into one that Llama does not have.
        """
        kinds = (self.mlp, self.norm, self.positions) == ("swiglu", "rmsnorm", "rotary")
        if not kinds or self.bias or self.qk_norm:
            raise ValueError("transformers' Llama has swiglu, rmsnorm, rotary positions and no bias")
        names = {"embedding.weight": HfTensor("model.embed_tokens.weight")}
        parts = {
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
        for layer in range(self.layers):
            for ours, theirs in parts.items():
                names[f"layers.{layer}.{ours}.weight"] = HfTensor(f"model.layers.{layer}.{theirs}.weight")
        names["norm.weight"] = HfTensor("model.norm.weight")
        if not self.tied:
            names["head.weight"] = HfTensor("lm_head.weight")
        return names
