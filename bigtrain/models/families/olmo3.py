"""OLMo 3 (OLMo Team 2025): like OLMo 2, with a sliding window in three of four layers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig, Positive
from bigtrain.models.families.llama import (
    check_shape,
    config_of_llama,
    full_attention_every,
    keys_of_llama,
    layer_types,
    rotary_of,
)
from bigtrain.models.families.olmo2 import SHAPE, names_in_olmo
from bigtrain.models.huggingface import HfTensor

EVERY = 4
"""If config.json has no `layer_types`, every layer of this interval has full attention."""


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of OLMo 3's shape; every key can be overridden."""

    arch: Literal["olmo3"] = "olmo3"
    mlp: Activation = "swiglu"
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    norm_at: Literal["before", "after", "both"] = "after"
    qk_norm: bool = True
    qk_norm_over: Literal["head", "heads"] = "heads"
    rope_theta: Annotated[float, Gt(1)] = 5e5
    rope_local_theta: Annotated[float, Gt(1)] | None = 5e5
    sliding_window: Positive | None = 4096
    full_attention_every: Positive | None = EVERY

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' Olmo3ForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that OLMo 3 does not have.
        """
        check_shape(self, "OLMo 3", ("sliding_window", "full_attention_every", "rope_local_theta"), **SHAPE)
        return names_in_olmo(self)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of an Olmo3ForCausalLM of this shape."""
        local = self.rope_local_theta or self.rope_theta
        return config_of_llama(self, rows) | {
            "architectures": ["Olmo3ForCausalLM"],
            "model_type": "olmo3",
            "sliding_window": self.sliding_window,
            "layer_types": layer_types(self),
            "rope_parameters": {
                "full_attention": {**rotary_of(self), "rope_theta": self.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        keys = keys_of_llama({"rms_norm_eps": 1e-5, **hf}, 5e5)
        types = hf.get("layer_types")
        local = ((hf.get("rope_parameters") or {}).get("sliding_attention") or {}).get("rope_theta")
        return {
            "arch": "olmo3",
            **keys,
            "sliding_window": hf.get("sliding_window", 4096),
            "full_attention_every": EVERY if types is None else full_attention_every(types),
            "rope_local_theta": float(local or keys["rope_theta"]),
        }
