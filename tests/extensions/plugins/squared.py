"""A user's family with a tensor plan and stages: Llama's blocks with GPT-2's norms and learned positions."""

from typing import Literal

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder_config import DecoderConfig


@FAMILIES.register
class Config(DecoderConfig):
    """A decoder of the user's own shape."""

    arch: Literal["squared"] = "squared"
    mlp: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "relu"
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    positions: Literal["rotary", "learned"] = "learned"
