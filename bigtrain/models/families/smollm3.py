"""SmolLM 3 (Bakouch et al. 2025): like Llama, with every fourth layer without positions. For SmolLM 1 and 2: llama."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import Activation, DecoderConfig, Positive
from bigtrain.models.families.llama import PARTS, check_shape, config_of_llama, keys_of_llama, names_in_llama
from bigtrain.models.huggingface import HfTensor, require

EVERY = 4


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of SmolLM 3's shape; every key can be overridden."""

    arch: Literal["smollm3"] = "smollm3"
    mlp: Activation = "swiglu"
    norm_eps: Annotated[float, Gt(0)] = 1e-6
    rope_theta: Annotated[float, Gt(1)] = 2e6
    no_rotary_every: Positive | None = EVERY
    tied: bool = True

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' SmolLM3ForCausalLM, by qualified name.

        Raises:
            ValueError: The shape was overridden into one that SmolLM 3 does not have.
        """
        check_shape(self, "SmolLM 3", ("no_rotary_every",))
        return names_in_llama(self, PARTS)

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of a SmolLM3ForCausalLM of this shape."""
        facts = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "use_sliding_window": False}
        rotated = [int(layer in self.rotary_layers) for layer in range(self.layers)]
        return facts | config_of_llama(self, rows) | {"no_rope_layers": rotated, "mlp_bias": False}

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """See `ModelConfig.from_hf_config`."""
        require(hf, {"mlp_bias": False})
        keys = keys_of_llama({"tie_word_embeddings": True, **hf}, 2e6)
        rotated = hf.get("no_rope_layers")
        every = hf.get("no_rope_layer_interval", EVERY)
        if rotated is not None:
            every = rotated.index(0) + 1 if 0 in rotated else None
            if rotated != [int(every is None or (layer + 1) % every != 0) for layer in range(len(rotated))]:
                raise ValueError(
                    f"its config.json says no_rope_layers: {rotated}, but bigtrain supports this only in every "
                    "n-th layer"
                )
        return {"arch": "smollm3", **keys, "no_rotary_every": every}
