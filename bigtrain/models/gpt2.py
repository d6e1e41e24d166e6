"""GPT-2 (Radford et al. 2019): LayerNorm, GELU, learned positions, biases, a tied head."""

from __future__ import annotations

from typing import Literal

from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.models.huggingface import HfTensor


class Config(DecoderConfig):
    """A decoder of GPT-2's shape; every key can be overridden."""

    arch: Literal["gpt2"] = "gpt2"
    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu_tanh"
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    positions: Literal["rotary", "learned"] = "learned"
    tied: bool = True
    bias: bool = True

    def hf_names(self) -> dict[str, HfTensor]:
        """Qualified names and their places in the state dict of transformers' GPT2LMHeadModel.

        Raises:
            ValueError: The shape was overridden into one that GPT-2 does not have.
        """
        kinds = (self.mlp, self.norm, self.positions) == ("gelu_tanh", "layernorm", "learned")
        heads = self.key_value_heads == self.heads and self.heads * self.width_of_head == self.width
        if not (kinds and heads and self.tied and self.bias and not self.qk_norm):
            raise ValueError("transformers' GPT-2 has gelu_tanh, layernorm, learned positions, bias, a tied head")
        names = {
            "embedding.weight": HfTensor("transformer.wte.weight"),
            "position_embedding.weight": HfTensor("transformer.wpe.weight"),
        }
        for layer in range(self.layers):
            ours, theirs = f"layers.{layer}.", f"transformer.h.{layer}."
            for kind in ("weight", "bias"):
                matrix = kind == "weight"
                names[f"{ours}attention_norm.{kind}"] = HfTensor(f"{theirs}ln_1.{kind}")
                for index, name in enumerate(("query", "key", "value")):
                    place = HfTensor(f"{theirs}attn.c_attn.{kind}", matrix, (index, 3))
                    names[f"{ours}attention.{name}.{kind}"] = place
                names[f"{ours}attention.output.{kind}"] = HfTensor(f"{theirs}attn.c_proj.{kind}", matrix)
                names[f"{ours}mlp_norm.{kind}"] = HfTensor(f"{theirs}ln_2.{kind}")
                names[f"{ours}mlp.up.{kind}"] = HfTensor(f"{theirs}mlp.c_fc.{kind}", matrix)
                names[f"{ours}mlp.down.{kind}"] = HfTensor(f"{theirs}mlp.c_proj.{kind}", matrix)
        for kind in ("weight", "bias"):
            names[f"norm.{kind}"] = HfTensor(f"transformer.ln_f.{kind}")
        return names
