"""Qwen 3 (Yang et al. 2025), dense models: like Llama, with queries and keys normalised per head."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig
from bigtrain.models.families.llama import PARTS, check_shape, config_of_llama, keys_of_llama, names_in_llama
from bigtrain.models.huggingface import HfTensor

NORMS = {"attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm"}


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of Qwen 3's shape; every key can be overridden."""

    arch: Literal["qwen3"] = "qwen3"
    mlp: Activation = "swiglu"
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    rope_theta: Annotated[float, Gt(1)] = 1e6
    qk_norm: bool = True

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' Qwen3ForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that Qwen 3 does not have.
        """
        check_shape(self, "Qwen 3", qk_norm=True)
        return names_in_llama(self, PARTS | NORMS)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a Qwen3ForCausalLM of this shape."""
        facts = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
        return facts | config_of_llama(self, rows)

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        return {"arch": "qwen3", **keys_of_llama(hf)}
