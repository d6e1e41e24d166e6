"""GPT-2 (Radford et al. 2019): LayerNorm, GELU, learned positions, biases, a tied head."""

from __future__ import annotations

from typing import Any, Literal

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig
from bigtrain.models.families.llama import check_shape
from bigtrain.models.huggingface import HfTensor, require


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of GPT-2's shape; every key can be overridden."""

    arch: Literal["gpt2"] = "gpt2"
    mlp: Activation = "gelu_tanh"
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    positions: Literal["rotary", "learned"] = "learned"
    tied: bool = True
    bias: bool = True

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' GPT2LMHeadModel, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that GPT-2 does not have.
        """
        check_shape(self, "GPT-2", mlp="gelu_tanh", norm="layernorm", positions="learned", bias=True, tied=True)
        if self.key_value_heads != self.heads or self.heads * self.width_of_head != self.width:
            raise ValueError(
                "transformers' GPT-2 needs kv_heads equal to heads, and width equal to heads times head_width"
            )
        names = {
            "embedding.weight": HfTensor("transformer.wte.weight"),
            "position_embedding.weight": HfTensor("transformer.wpe.weight"),
        }
        for layer in range(self.layers):
            native, hf = f"layers.{layer}.", f"transformer.h.{layer}."
            for kind in ("weight", "bias"):
                matrix = kind == "weight"
                names[f"{native}attention_norm.{kind}"] = HfTensor(f"{hf}ln_1.{kind}")
                for index, name in enumerate(("query", "key", "value")):
                    place = HfTensor(f"{hf}attn.c_attn.{kind}", matrix, (index, 3))
                    names[f"{native}attention.{name}.{kind}"] = place
                names[f"{native}attention.output.{kind}"] = HfTensor(f"{hf}attn.c_proj.{kind}", matrix)
                names[f"{native}mlp_norm.{kind}"] = HfTensor(f"{hf}ln_2.{kind}")
                names[f"{native}mlp.up.{kind}"] = HfTensor(f"{hf}mlp.c_fc.{kind}", matrix)
                names[f"{native}mlp.down.{kind}"] = HfTensor(f"{hf}mlp.c_proj.{kind}", matrix)
        for kind in ("weight", "bias"):
            names[f"norm.{kind}"] = HfTensor(f"transformer.ln_f.{kind}")
        return names

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a GPT2LMHeadModel of this shape."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": rows,
            "n_positions": self.position_count,
            "n_embd": self.width,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.hidden_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": self.norm_eps,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "attn_pdrop": 0.0,
            "initializer_range": self.init_std,
            "tie_word_embeddings": True,
        }

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        only = {"activation_function": "gelu_new", "tie_word_embeddings": True, "scale_attn_weights": True}
        off = dict.fromkeys(
            ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"), False
        )
        require(hf, {**only, **off})
        positions = hf.get("n_positions", 1024)
        keys = {
            "arch": "gpt2",
            "layers": hf.get("n_layer", 12),
            "width": hf.get("n_embd", 768),
            "heads": hf.get("n_head", 12),
            "context": positions,
            "max_positions": positions,
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        }
        return keys if hf.get("n_inner") is None else {**keys, "mlp_width": hf["n_inner"]}
