"""The base config of all model families, their registry, and the presets; does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import yaml
from annotated_types import Ge
from pydantic import model_validator

from bigtrain.config import Registry, Section, UserError, nearest
from bigtrain.models.batches import batch_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bigtrain.models.huggingface import HfTensor
    from bigtrain.models.pictures import Picture, Shown

DataKind = str
"""The name of a sample kind (`batches.KINDS`)."""

TensorRole = Literal["column", "row", "vocab", "whole", "heads"]
"""How a parameter is split over the ranks of a tensor-parallel group.

column: a linear layer's outputs are split (dim 0 of its weight and bias). row: a linear layer's inputs are split (dim 1
of its weight). vocab: the rows of an embedding or head are split. whole: not split; the parameter is applied to the
residual stream, of which each rank may hold a slice. heads: not split; it is applied to the rank's own heads."""


class Flops(NamedTuple):
    """Matmul FLOPs of the forward and backward pass, per token (tokens, captions) or per sample (images, arrays)."""

    full: int
    """Attention is counted over the full square: the convention of MFU (PaLM, torchtitan, MPT)."""
    causal: int
    """Attention is counted only over the causal half, the part that must be computed."""

    @classmethod
    def unknown(cls) -> Flops:
        """The value for a model whose FLOPs cannot be counted; its utilisation is not reported."""
        return cls(0, 0)


class BlockCosts(NamedTuple):
    """Costs by which a pipeline distributes blocks over stages, in units of the cost of one block."""

    blocks: int
    """Number of blocks, all of equal cost."""
    before: float
    """Cost of the modules before the blocks, which the first stage holds in addition."""
    after: float
    """Cost of the modules after the blocks, which the last stage holds in addition."""


class ModelConfig(Section):
    """Base class of every family's `Config`. For images and arrays, `vocab_size` below is the number of classes."""

    data_kind: ClassVar[DataKind] = "tokens"
    """The sample kind that the family is trained on."""

    keeps_contract: ClassVar[bool] = True
    """Whether `build` returns a `contract.Model`; models of transformers are none."""

    is_plain: ClassVar[bool] = False
    """Whether `build` returns a plain PyTorch module (see `models.plain`), whose code is independent of ranks."""

    parts: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that a step updates one after another, each with its own loss (`optimizer.parts`). Only plain
    modules have parts."""

    takes_documents: ClassVar[bool] = False
    """Whether `forward` supports the batch's `documents` and `positions` (`data.document_mask`)."""

    begins_from_weights: ClassVar[bool] = False
    """Whether a run must set `init.source`, because the loss compares the model with its initial weights."""

    predicts_text: ClassVar[bool] = True
    """Whether a loss on text is that of each token given the tokens before it. Perplexity and bits per byte are
    reported only then."""

    counted: ClassVar[str] = ""
    """What the loss's sum of weights counts, in the plural ("masked tokens"); empty: what the data's weights count."""

    loss_unit: ClassVar[str] = ""
    """Unit of the loss, as pages show it ("nats per image"); empty if it has none or is not known."""

    vocabulary_name: ClassVar[str] = "embedding.weight"
    """Qualified name of a parameter with one row for each token of the vocabulary."""

    hides_tokens: ClassVar[bool] = False
    """Whether the model is trained to predict masked tokens. Its key `mask` is then the id of the mask token."""

    hf_keys: ClassVar[Mapping[str, str]] = {}
    """Keys of the section whose values must equal those of a config.json, and their names in config.json."""

    hf_unused: ClassVar[str] = r"lm_head\.weight"
    """Regular expression for the names of tensors that Hugging Face weights may contain but the model does not use."""

    later_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that were added when runs without them existed: at their defaults they are not part of a run's identity."""

    arch: str
    """The family: the name of a file in bigtrain/models/families, or of a plugin's class."""

    context: Annotated[int, Ge(1)] = 1
    """Number of tokens of one training sequence or caption; only for families that are trained on tokens."""

    @model_validator(mode="after")
    def _context_is_for_tokens(self) -> ModelConfig:
        of_tokens = batch_kind(self).of_tokens
        if not of_tokens and "context" in self.model_fields_set and self.context != 1:
            raise ValueError(f"{self.arch} does not take context, because it learns from {self.data_kind}")
        if of_tokens and "context" not in self.model_fields_set:
            raise ValueError("the key 'context', tokens of one training sequence, is missing")
        return self

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape (height, width, channels) of the images that the model requires; None if it accepts any sample."""
        return None

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the arrays in a sample of kind `arrays`; a class label is `labels`, of shape ()."""
        return {}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Shell patterns over qualified names: parameters that are frozen in addition to `optimizer.frozen`."""
        return ()

    @property
    def base(self) -> ModelConfig:
        """The section of the model whose weights this model starts from: this section, or one nested in it."""
        return self

    def has_vocabulary_rows(self, name: str) -> bool:
        """Whether a parameter, by its qualified name, has one row for each token of the vocabulary."""
        return False

    @property
    def follows_mup(self) -> bool:
        """Whether the model uses muP (mup.py), which sets constants of the model and learning rates of parameters."""
        return False

    def lr_scale(self, name: str) -> float:
        """muP's factor of a parameter's learning rate, by qualified name; the weight decay is divided by it."""
        return 1.0

    def folded(self, name: str, value: Tensor) -> Tensor:
        """The value of a parameter after muP's constants are folded into the weights.

        A model without muP computes the same function with these values.

        Args:
            name: Qualified name of the parameter.
            value: The full (unsharded) parameter, with an adapter merged into it if there is one.
        """
        return value

    def source_name(self, name: str) -> str:
        """The tensor of `init.source` that a parameter starts from, if the source has none of the parameter's own name.

        Both are qualified names.
        """
        return name

    def is_adapter(self, name: str) -> bool:
        """Whether a parameter, by its qualified name, belongs to an adapter, so that a base model's weights lack it."""
        return False

    def adapted_weights(self) -> list[str]:
        """Qualified names of the matrices that have an adapter.

        Raises:
            ValueError: transformers has no model of this shape.
        """
        return []

    def has_inputs_first(self, name: str) -> bool:
        """Whether a matrix, by its qualified name, has shape (inputs, outputs), as in transformers' Conv1D."""
        return False

    def check_source(self, vocab_size: int) -> None:
        """Check that the model's weights file and its token ids fit the vocabulary of the data.

        Raises:
            UserError: Something does not fit. The error says how to fix it.
        """

    def fingerprint(self) -> dict[str, str]:
        """Keys of the section that name a file, with a hash of its content, which enters the run's identity."""
        return {}

    def tensor_parallel_sizes(self) -> dict[str, int] | None:
        """Sizes, by key, that tensor parallelism splits and `layout.tp` must divide; None without a tensor plan."""
        return None

    def context_parallel_heads(self) -> tuple[int, int] | None:
        """Number of query heads and of key heads of a layer, which context parallelism splits.

        None if the family does not support context parallelism. A family supports it if tokens interact only in a
        causal `layers.Attention`, and `forward` uses the batch's `sequence_positions` and `mask`.
        """
        return None

    def block_costs(self, vocab_size: int) -> BlockCosts | None:
        """Costs by which the model is cut into pipeline stages; None for a family that is not `contract.Staged`."""
        return None

    def hf_names(self) -> dict[str, HfTensor]:
        """Position of each parameter in the state dict of transformers' model of this shape, by qualified name.

        Raises:
            ValueError: transformers has no model of this shape.
        """
        raise ValueError(f"transformers has no model for arch '{self.arch}'")

    def hf_zeros(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of tensors of transformers' state dict without a parameter here; their values are zero."""
        return {}

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of transformers' model of this shape.

        Args:
            rows: Number of rows of the parameter `vocabulary_name`.

        Raises:
            ValueError: transformers has no model of this shape.
        """
        raise ValueError(f"transformers has no model for arch '{self.arch}'")

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """Convert a config.json of this family to keys of `model`.

        Raises:
            ValueError: The config.json needs a feature that the family does not have.
        """
        raise ValueError(f"bigtrain has no arch for the transformers model type '{hf.get('model_type')}'")

    def build(self, vocab_size: int) -> nn.Module:
        """The module (`contract.Model`) on torch's current default device; its parameters are not yet initialized."""
        raise TypeError(f"{type(self).__name__} does not say how to build its model: define build()")

    def build_to_load(self, vocab_size: int, seed: int) -> nn.Module:
        """The module on the CPU, into which the weights of a checkpoint are loaded.

        Args:
            seed: The run's seed: plain modules may hold random tables that no checkpoint contains.
        """
        return self.build(vocab_size)

    def build_for_engine(self, vocab_size: int, seed: int) -> nn.Module:
        """The module as engines expect it: on the meta device; `init.materialise` fills in its values later.

        Raises:
            UserError: The module does not keep the contract (`contract.Model`).
        """
        import torch

        from bigtrain.models.check import check_module

        with torch.device("meta"):
            module = self.build(vocab_size)
        check_module(module, f"the model of arch '{self.arch}'")
        return module

    def check(self, vocab_size: int, across_layouts: bool = False) -> None:
        """Refuse a model that would not compute what its author intends, before any rank starts.

        Args:
            across_layouts: Whether every random draw must be equal in all layouts, as it is for native families.

        Raises:
            UserError: The model violates a rule. The error describes the first violation found.
        """
        from bigtrain.models.check import check_contract

        check_contract(self, vocab_size)

    def pictures(self, network: nn.Module, shown: Shown) -> Mapping[str, Picture]:
        """The pictures that the callback `pictures` shows, by title; a family without pictures returns none.

        Args:
            network: The module that `build` returns, with the run's full (unsharded) weights, in evaluation mode and
                without gradients.
            shown: Held-out samples. torch's generator starts from the same seed at each call.
        """
        return {}

    def attention_pictures(self, network: nn.Module, shown: Shown) -> Mapping[str, Picture]:
        """Pictures of the last layer's attention, by title: shown by the callback `pictures` with `attention: true`.

        Args:
            network: See `pictures`.
            shown: See `pictures`.
        """
        return {}

    def metric_units(self) -> dict[str, str]:
        """Units of the metrics of every run that depend on the model, by their names in metrics.jsonl; "": no unit."""
        kind = batch_kind(self)
        counted = self.counted or kind.counted or kind.unit
        loss = f"of the {self.parts[0]}" if self.parts else self.loss_unit
        return {"tokens": counted, "tokens_per_s": f"{counted}/s", "loss": loss, "val_loss": loss}

    def parameter_count(self, vocab_size: int) -> int:
        """Number of parameters of the module that `build` returns; a tied weight is counted once."""
        raise TypeError(f"{type(self).__name__} does not count its parameters: define parameter_count()")

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Number of parameters without the input embeddings (tokens and positions), as scaling laws count them."""
        return self.parameter_count(vocab_size)

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Matmul FLOPs of the forward and backward pass, per token (tokens, captions) or sample (images, arrays)."""
        raise TypeError(f"{type(self).__name__} does not count its FLOPs: define flops_per_token()")


FAMILIES = Registry("model family", ModelConfig, package="bigtrain.models.families", tag="arch", where="model.arch")
"""All model families by their `arch`. Users add their own with --plugin FILE."""


@cache
def _presets() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return presets


def presets() -> list[str]:
    """The names of all presets."""
    return sorted(_presets())


def preset(name: str) -> dict[str, Any]:
    """The keys of `model` that the preset `name` defines, as a new dict that the caller may change.

    Raises:
        UserError: There is no such preset.
    """
    if name not in _presets():
        near = nearest(name, _presets())
        hint = f"Did you mean {near!r}? " if near else ""
        raise UserError(f"unknown preset {name!r}", "model.preset", f"{hint}presets: {', '.join(presets())}")
    return dict(_presets()[name])
