"""Mistral (Jiang et al. 2023): like Llama; some versions have a sliding window in every layer."""

from __future__ import annotations

from typing import Any, Literal

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig
from bigtrain.models.families.llama import PARTS, check_shape, config_of_llama, keys_of_llama, names_in_llama
from bigtrain.models.huggingface import HfTensor


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of Mistral's shape; every key can be overridden."""

    arch: Literal["mistral"] = "mistral"
    mlp: Activation = "swiglu"

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' MistralForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that Mistral does not have.
        """
        check_shape(self, "Mistral", free=("sliding_window",))
        return names_in_llama(self, PARTS)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a MistralForCausalLM of this shape."""
        facts = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        return facts | config_of_llama(self, rows) | {"sliding_window": self.sliding_window}

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        return {"arch": "mistral", **keys_of_llama(hf), "sliding_window": hf.get("sliding_window", 4096)}
