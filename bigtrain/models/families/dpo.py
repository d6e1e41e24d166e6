"""Direct preference optimisation (Rafailov et al. 2023): a decoder is trained on pairs of answers.

A sample is a prompt with a chosen and a rejected answer. With the log-likelihoods log p of the policy and log q of the
frozen reference, the loss of a pair is (eq. 7)

    -log sigmoid(beta * ((log p(chosen) - log q(chosen)) - (log p(rejected) - log q(rejected))))

Parameters of the policy have the names of the decoder; names of the reference's parameters start with "reference.".
Both start from the weights of `init.source`. With an adapter, the reference is the policy without the adapter, so that
there is only one copy of the weights.

Shapes: B pairs, C tokens; sequences 2 i and 2 i + 1 of 2 B are the chosen and the rejected answer of pair i.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Gt
from pydantic import PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from bigtrain.models.adapter import AdapterConfig
from bigtrain.models.config import FAMILIES, DataKind, Flops, ModelConfig, preset
from bigtrain.models.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bigtrain.models.huggingface import HfTensor
    from bigtrain.models.preferences import PreferenceModel

REFERENCE = "reference."


def _read(value: Any) -> DecoderConfig:
    if isinstance(value, DecoderConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError("a policy is a mapping of keys, as 'model' is")
    keys = {key: value[key] for key in value if key != "preset"}
    found = FAMILIES.read({**preset(value["preset"]), **keys} if "preset" in value else keys)
    if not isinstance(found, DecoderConfig):
        raise ValueError(f"arch '{found.arch}' is not one of bigtrain's decoders")
    return found


Policy = Annotated[
    DecoderConfig,
    PlainValidator(_read),
    PlainSerializer(lambda policy: policy.plain()),
    WithJsonSchema({"type": "object", "description": "The keys of a decoder, as `model` has them."}),
]
"""The section of a decoder, read by its `arch`. (The registry's own annotation would include this family.)"""


@FAMILIES.register
class Config(ModelConfig):
    """A decoder as the policy, and the strength that keeps it near the reference."""

    data_kind: ClassVar[DataKind] = "preferences"
    begins_from_weights: ClassVar[bool] = True
    predicts_text: ClassVar[bool] = False
    loss_unit: ClassVar[str] = "nats per pair"

    arch: Literal["dpo"] = "dpo"
    policy: Policy
    """The decoder that is trained, with the keys of `model`: {arch: llama, ...}, or {preset: NAME}. It also sets
    `context`."""
    beta: Annotated[float, Gt(0)] = 0.1
    """Factor of the log-likelihood ratios; a larger value keeps the policy nearer to the reference."""

    @model_validator(mode="before")
    @classmethod
    def _context_of_policy(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("policy") is None:
            return value
        policy = _read(value["policy"])
        return {**value, "policy": policy, "context": policy.context}

    @model_validator(mode="after")
    def _has_no_dropout(self) -> Config:
        if self.policy.dropout:
            raise ValueError("policy.dropout must be 0: policy and reference are compared")
        return self

    @property
    def adapter(self) -> AdapterConfig | None:
        """The policy's adapter."""
        return self.policy.adapter

    @property
    def frozen(self) -> tuple[str, ...]:
        """See `ModelConfig.frozen`: the reference, or with an adapter, all parameters except the adapter's."""
        return self.policy.frozen if self.adapter is not None else (f"{REFERENCE}*",)

    def adapted_weights(self) -> list[str]:
        """See `ModelConfig.adapted_weights`."""
        return self.policy.adapted_weights()

    def is_adapter(self, name: str) -> bool:
        """See `ModelConfig.is_adapter`."""
        return self.policy.is_adapter(name)

    @property
    def follows_mup(self) -> bool:
        """See `ModelConfig.follows_mup`; the value of the policy."""
        return self.policy.follows_mup

    def lr_scale(self, name: str) -> float:
        """See `ModelConfig.lr_scale`; the value of the policy."""
        return self.policy.lr_scale(name)

    def folded(self, name: str, value: Tensor) -> Tensor:
        """See `ModelConfig.folded`; the value of the policy."""
        return self.policy.folded(name, value)

    @property
    def base(self) -> ModelConfig:
        """See `ModelConfig.base`."""
        return self.policy

    def has_vocabulary_rows(self, name: str) -> bool:
        """See `ModelConfig.has_vocabulary_rows`."""
        return self.policy.has_vocabulary_rows(name.removeprefix(REFERENCE))

    def source_name(self, name: str) -> str:
        """See `ModelConfig.source_name`."""
        return name.removeprefix(REFERENCE)

    def tensor_parallel_sizes(self) -> dict[str, int]:
        """See `ModelConfig.tensor_parallel_sizes`; the sizes of the policy."""
        return self.policy.tensor_parallel_sizes()

    def hf_names(self) -> dict[str, HfTensor]:
        """See `ModelConfig.hf_names`; only the policy is exported."""
        return self.policy.hf_names()

    def hf_config(self, rows: int) -> dict[str, Any]:
        """See `ModelConfig.hf_config`; the config.json of the policy."""
        return self.policy.hf_config(rows)

    def build(self, vocab_size: int) -> PreferenceModel:
        """The module; its parameters are not yet initialized."""
        from bigtrain.models.preferences import PreferenceModel

        return PreferenceModel(self.policy, vocab_size, self.beta)

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters, including the reference."""
        copies = 1 if self.adapter is not None else 2
        return copies * self.policy.parameter_count(vocab_size)

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Number of parameters of the policy without its input embeddings."""
        return self.policy.parameter_count_without_embeddings(vocab_size)

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Matmul FLOPs per token of the context, of which a pair has two sequences.

        Both sequences pass through the policy, forward and backward, and through the reference, forward only, which is
        a third of the policy's cost.
        """
        policy = self.policy.model_copy(update={"adapter": None}).flops_per_token(vocab_size)
        full, causal = (2 * (flops + flops // 3) for flops in policy)
        return Flops(full, causal)
