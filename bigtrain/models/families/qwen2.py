"""Qwen 2 and 2.5 (Yang et al. 2024), dense models: like Llama, with a bias on queries, keys and values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig
from bigtrain.models.families.llama import PARTS, check_shape, config_of_llama, keys_of_llama, names_in_llama
from bigtrain.models.huggingface import HfTensor


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of Qwen 2's shape; every key can be overridden."""

    arch: Literal["qwen2"] = "qwen2"
    mlp: Activation = "swiglu"
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    rope_theta: Annotated[float, Gt(1)] = 1e6
    qkv_bias: bool = True

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' Qwen2ForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that Qwen 2 does not have.
        """
        check_shape(self, "Qwen 2", qkv_bias=True)
        names = names_in_llama(self, PARTS)
        for layer in range(self.layers):
            for part in ("query", "key", "value"):
                place = f"model.layers.{layer}.{PARTS[f'attention.{part}']}.bias"
                names[f"layers.{layer}.attention.{part}.bias"] = HfTensor(place)
        return names

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a Qwen2ForCausalLM of this shape. It has no key for the bias, which Qwen 2 always has."""
        facts = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
        common = config_of_llama(self, rows)
        if common.pop("head_dim") != self.width // self.heads:
            raise ValueError(
                "transformers' Qwen 2 needs width equal to heads times head_width: remove model.head_width"
            )
        return facts | {key: value for key, value in common.items() if key != "attention_bias"}

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        return {"arch": "qwen2", **keys_of_llama(hf), "qkv_bias": True}
