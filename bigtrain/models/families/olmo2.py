"""OLMo 2 (OLMo Team 2024): norms after the branches; queries and keys are normalised over all heads together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig
from bigtrain.models.families.llama import PARTS, check_shape, config_of_llama, keys_of_llama, names_in_llama
from bigtrain.models.families.qwen3 import NORMS
from bigtrain.models.huggingface import HfTensor

OUTPUT_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
SHAPE: dict[str, Any] = {"norm_at": "after", "qk_norm": True, "qk_norm_over": "heads"}


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of OLMo 2's shape; every key can be overridden."""

    arch: Literal["olmo2"] = "olmo2"
    mlp: Activation = "swiglu"
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    norm_at: Literal["before", "after", "both"] = "after"
    qk_norm: bool = True
    qk_norm_over: Literal["head", "heads"] = "heads"
    rope_theta: Annotated[float, Gt(1)] = 5e5

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' Olmo2ForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that OLMo 2 does not have.
        """
        check_shape(self, "OLMo 2", **SHAPE)
        return names_in_olmo(self)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of an Olmo2ForCausalLM of this shape."""
        facts = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
        return config_of_llama(self, rows) | facts

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        return {"arch": "olmo2", **keys_of_llama({"rms_norm_eps": 1e-5, **hf})}


def names_in_olmo(config: DecoderConfig) -> dict[str, HfTensor]:
    """Position of each parameter in the state dicts of transformers' OLMo 2 and 3, by qualified name."""
    parts = {native: hf for native, hf in PARTS.items() if not native.endswith("_norm")}
    return names_in_llama(config, parts | NORMS | OUTPUT_NORMS)
