"""Phi 1, 1.5 and 2 (Li et al. 2023): parallel blocks, LayerNorm, partial rotary positions, biases also in the head."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig
from bigtrain.models.families.llama import check_shape, config_of_llama, keys_of_llama
from bigtrain.models.huggingface import HfTensor, require

PARTS = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.dense",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
SHAPE: dict[str, Any] = {
    "mlp": "gelu_tanh", "norm": "layernorm", "bias": True, "head_bias": True, "parallel_block": True,
}  # fmt: skip


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of Phi's shape; every key can be overridden."""

    arch: Literal["phi"] = "phi"
    mlp: Activation = "gelu_tanh"
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    bias: bool = True
    head_bias: bool = True
    parallel_block: bool = True
    rotary_part: Annotated[float, Gt(0), Le(1)] = 0.5

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' PhiForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that Phi does not have.
        """
        check_shape(self, "Phi", ("rotary_part",), **SHAPE)
        if self.heads * self.width_of_head != self.width:
            raise ValueError("transformers' Phi needs width equal to heads times head_width: remove model.head_width")
        names = {"embedding.weight": HfTensor("model.embed_tokens.weight")}
        for kind in ("weight", "bias"):
            for layer in range(self.layers):
                for native, hf in PARTS.items():
                    names[f"layers.{layer}.{native}.{kind}"] = HfTensor(f"model.layers.{layer}.{hf}.{kind}")
            names[f"norm.{kind}"] = HfTensor(f"model.final_layernorm.{kind}")
            names[f"head.{kind}"] = HfTensor(f"lm_head.{kind}")
        return names

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a PhiForCausalLM of this shape."""
        common = config_of_llama(self, rows)
        rotary = {**common["rope_parameters"], "partial_rotary_factor": self.rotary_part}
        dropped = ("attention_bias", "rms_norm_eps", "head_dim")
        return {key: value for key, value in common.items() if key not in dropped} | {
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            "hidden_act": "gelu_new",
            "layer_norm_eps": self.norm_eps,
            "partial_rotary_factor": self.rotary_part,
            "rope_parameters": rotary,
            "qk_layernorm": False,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
        }

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        require(hf, {"hidden_act": "gelu_new", "qk_layernorm": False, "tie_word_embeddings": False})
        eps = hf.get("layer_norm_eps", 1e-5)
        rotary = hf.get("rope_parameters") or {}
        part = rotary.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5))
        keys = keys_of_llama({**hf, "hidden_act": "silu", "rms_norm_eps": eps})
        return {"arch": "phi", **keys, "rotary_part": float(part)}
