"""Gemma 3 (Gemma Team 2025), text only: local and global attention layers, norms before and after each branch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig, Positive
from bigtrain.models.families.llama import (
    PARTS,
    check_shape,
    config_of_llama,
    full_attention_every,
    keys_of_llama,
    layer_types,
    names_in_llama,
    rotary_of,
)
from bigtrain.models.families.qwen3 import NORMS
from bigtrain.models.huggingface import HfTensor, require

OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
ACTIVATION = "gelu_pytorch_tanh"
PATTERN = 6
"""If config.json has no `layer_types`, every layer of this interval has full attention."""


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of Gemma 3's shape; every key can be overridden."""

    arch: Literal["gemma3_text"] = "gemma3_text"
    mlp: Activation = "geglu"
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    norm_at: Literal["before", "after", "both"] = "both"
    norm_offset: bool = True
    qk_norm: bool = True
    rope_theta: Annotated[float, Gt(1)] = 1e6
    rope_local_theta: Annotated[float, Gt(1)] | None = 1e4
    sliding_window: Positive | None = 512
    full_attention_every: Positive | None = PATTERN
    score_width: Positive | None = 256
    scale_embedding: bool = True
    tied: bool = True

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' Gemma3ForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that Gemma 3 does not have.
        """
        fixed = {"mlp": "geglu", "norm_at": "both", "norm_offset": True, "qk_norm": True, "scale_embedding": True}
        free = ("sliding_window", "full_attention_every", "rope_local_theta", "score_width")
        check_shape(self, "Gemma 3", free, **fixed)
        return names_in_llama(self, PARTS | NORMS | OUTPUT_NORMS)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a Gemma3ForCausalLM of this shape."""
        common = config_of_llama(self, rows)
        del common["hidden_act"]
        default = {"rope_type": "default", "rope_theta": self.rope_local_theta or self.rope_theta}
        return common | {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": ACTIVATION,
            "query_pre_attn_scalar": self.width_of_head if self.score_width is None else self.score_width,
            "sliding_window": self.sliding_window,
            "layer_types": layer_types(self),
            "rope_local_base_freq": self.rope_local_theta or self.rope_theta,
            "rope_parameters": {
                "full_attention": {**rotary_of(self), "rope_theta": self.rope_theta},
                "sliding_attention": default,
            },
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        off = ("attn_logit_softcapping", "final_logit_softcapping")
        require(hf, {"hidden_activation": ACTIVATION, "use_bidirectional_attention": False} | dict.fromkeys(off))
        keys = keys_of_llama({"tie_word_embeddings": True, "head_dim": 256, **hf, "hidden_act": "silu"}, 1e6)
        every = hf.get("sliding_window_pattern", PATTERN)
        types = hf.get("layer_types")
        local = ((hf.get("rope_parameters") or {}).get("sliding_attention") or {}).get("rope_theta")
        return {
            "arch": "gemma3_text",
            **keys,
            "sliding_window": hf.get("sliding_window", 4096),
            "full_attention_every": every if types is None else full_attention_every(types),
            "rope_local_theta": float(hf.get("rope_local_base_freq") or local or 1e4),
            "score_width": int(hf.get("query_pre_attn_scalar", 256)),
        }
