"""What is common to all model families, without torch: the config, counts, families, presets."""

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
"""How a parameter lies on the ranks that share each matrix.

column: a linear layer's outputs are split (its weight and bias, dim 0). row: its inputs are (its weight, dim 1).
vocab: the rows of an embedding or head are. whole: not split, and applied to the residual stream, of which
each rank may hold a slice. heads: not split, and applied to the rank's own heads."""


class Flops(NamedTuple):
    """Matmul FLOPs of forward and backward together, a token (tokens, captions) or a sample (images, arrays)."""

    full: int
    """Attention counted over the whole square: the convention of MFU (PaLM, torchtitan, MPT)."""
    causal: int
    """Attention counted over the causal half alone: what must be computed."""

    @classmethod
    def unknown(cls) -> Flops:
        """Of a model that cannot be counted: utilisation is not available."""
        return cls(0, 0)


class BlockCosts(NamedTuple):
    """What a pipeline shares out, in units of the cost of one block."""

    blocks: int
    """Blocks, all of one cost."""
    before: float
    """Cost of what the first stage holds as well."""
    after: float
    """Cost of what the last stage holds as well."""


class ModelConfig(Section):
    """What every family's `Config` inherits. `vocab_size` below is the number of classes for images and arrays."""

    data_kind: ClassVar[DataKind] = "tokens"
    """The kind of data that the family learns from."""

    keeps_contract: ClassVar[bool] = True
    """Whether what it builds is a `contract.Model`; models of transformers are not."""

    is_plain: ClassVar[bool] = False
    """Whether it builds a plain module of PyTorch (`plain.PlainModel`), which knows nothing of ranks."""

    parts: ClassVar[tuple[str, ...]] = ()
    """Names of what a step updates one after another, each by its own loss (`optimizer.parts`); of a plain module."""

    takes_documents: ClassVar[bool] = False
    """Whether `forward` supports the batch's `documents` and `positions` (`data.document_mask`)."""

    begins_from_weights: ClassVar[bool] = False
    """Whether a run must have an `init.source`: its loss compares the model with the weights that it began with."""

    predicts_text: ClassVar[bool] = True
    """Whether a loss on text is that of each token given those before it: bits per byte are reported of no other."""

    vocabulary_name: ClassVar[str] = "embedding.weight"
    """The qualified name of a parameter that has a row for each token of the vocabulary."""

    hides_tokens: ClassVar[bool] = False
    """Whether it learns text by guessing tokens that a mask token stands for (`mask`: its id in the vocabulary)."""

    hf_keys: ClassVar[Mapping[str, str]] = {}
    """Keys of the section whose values must be those of a config.json, and their names in it."""

    hf_unused: ClassVar[str] = r"lm_head\.weight"
    """A regular expression: tensors that Hugging Face weights may hold and the model has no use for."""

    later_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that were added after runs had begun: at their defaults they are not part of a run's identity."""

    arch: str
    """The family: the name of a file in bigtrain/models/families, or of a plugin's class."""

    context: Annotated[int, Ge(1)] = 1
    """Tokens of one training sequence, or of a caption; a family of another kind of data has none to set."""

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
        """Shape (height, width, channels) of the images that the model requires; None if it takes any sample."""
        return None

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the arrays of a sample that the model takes (kind `arrays`); a class is `labels`, ()."""
        return {}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Shell patterns over qualified names: the parameters that stay as they are, whatever `optimizer.frozen`."""
        return ()

    @property
    def base(self) -> ModelConfig:
        """The section of the model whose weights this one begins with: itself, or the one inside it."""
        return self

    def has_vocabulary_rows(self, name: str) -> bool:
        """Whether the rows of a parameter, by its qualified name, are those of the vocabulary."""
        return False

    @property
    def follows_mup(self) -> bool:
        """Whether muP (mup.py) sets its constants and the learning rates of its parameters."""
        return False

    def lr_scale(self, name: str) -> float:
        """muP's factor on the learning rate of a parameter, by its qualified name; weight decay is divided by it."""
        return 1.0

    def folded(self, name: str, value: Tensor) -> Tensor:
        """The value of a parameter, by its qualified name, in a model without muP's constants that computes the same.

        Args:
            value: The full (unsharded) parameter, an adapter merged into it.
        """
        return value

    def source_name(self, name: str) -> str:
        """The name in a source of what a parameter begins with, where the source does not have its own name."""
        return name

    def is_adapter(self, name: str) -> bool:
        """Whether a parameter, by its qualified name, is one of an adapter's: weights of a base model lack it."""
        return False

    def adapted_weights(self) -> list[str]:
        """The matrices that have an adapter, by qualified name.

        Raises:
            ValueError: As `hf_names`.
        """
        return []

    def has_inputs_first(self, name: str) -> bool:
        """Whether a matrix, by its qualified name, is (inputs, outputs), as transformers' Conv1D of GPT-2."""
        return False

    def check_source(self, vocab_size: int) -> None:
        """Refuse a model that does not fit the vocabulary of the data: by the file that it is read from, or by its ids.

        Raises:
            UserError: What does not fit, and what would.
        """

    def fingerprint(self) -> dict[str, str]:
        """Keys of the section that name a file, and the hash of what they name: a run's identity is by content."""
        return {}

    def tensor_parallel_sizes(self) -> dict[str, int] | None:
        """The keys whose sizes tensor parallelism divides, so that tp must divide them; None without a tensor plan."""
        return None

    def context_parallel_heads(self) -> tuple[int, int] | None:
        """Query heads and key heads of a layer, which ranks that share a sequence share too.

        None where they cannot: tokens must meet in a causal `layers.Attention` alone, and `forward` must use the
        batch's `sequence_positions` and `mask`.
        """
        return None

    def block_costs(self, vocab_size: int) -> BlockCosts | None:
        """What a cut into stages goes by; None for a family that cannot be cut (`contract.Staged`)."""
        return None

    def hf_names(self) -> dict[str, HfTensor]:
        """Where each parameter lies in the state dict of the model that transformers has of this shape.

        Raises:
            ValueError: It has none.
        """
        raise ValueError(f"transformers has no model for arch '{self.arch}'")

    def hf_zeros(self) -> dict[str, tuple[int, ...]]:
        """Shapes, by name, of tensors of that state dict which are zero, since no parameter corresponds to them."""
        return {}

    def hf_config(self, rows: int) -> dict[str, Any]:
        """The config.json of that model, where the parameter `vocabulary_name` has `rows` rows.

        Raises:
            ValueError: transformers has no such model.
        """
        raise ValueError(f"transformers has no model for arch '{self.arch}'")

    @classmethod
    def from_hf_config(cls, hf: dict[str, Any]) -> dict[str, Any]:
        """The keys of `model` that a config.json of this family stands for.

        Raises:
            ValueError: It needs a feature that the family does not have.
        """
        raise ValueError(f"bigtrain has no arch for the transformers model type '{hf.get('model_type')}'")

    def build(self, vocab_size: int) -> nn.Module:
        """The module (`contract.Model`) on torch's current default device; its parameters are not yet initialized."""
        raise TypeError(f"{type(self).__name__} does not say how to build its model: define build()")

    def build_for_engine(self, vocab_size: int, seed: int) -> nn.Module:
        """The module as engines take it: on the meta device, its values to be filled in by `init.materialise`.

        Raises:
            UserError: It does not keep the contract (`contract.Model`).
        """
        import torch

        from bigtrain.models.check import check_module

        with torch.device("meta"):
            module = self.build(vocab_size)
        check_module(module, f"the model of arch '{self.arch}'")
        return module

    def check(self, vocab_size: int, across_layouts: bool = False) -> None:
        """Refuse a model that would compute something else than its author means, before any rank starts.

        Args:
            across_layouts: Whether every draw must be the same at all layouts, as those of the families here are.

        Raises:
            UserError: The first thing that is wrong, by its qualified name.
        """
        from bigtrain.models.check import check_contract

        check_contract(self, vocab_size)

    def pictures(self, network: nn.Module, shown: Shown) -> Mapping[str, Picture]:
        """What the callback `pictures` shows, by title; a family that overrides nothing offers none.

        Args:
            network: What `build` returns, with the run's full weights, in evaluation mode and without gradients.
            shown: Held-out samples. Random draws of torch are the same at each call.
        """
        return {}

    def attention_pictures(self, network: nn.Module, shown: Shown) -> Mapping[str, Picture]:
        """What the callback `pictures` shows with `attention: true`, by title: where the last layer looks.

        Args:
            network: As `pictures` takes it.
            shown: As `pictures` takes it.
        """
        return {}

    def parameter_count(self, vocab_size: int) -> int:
        """Parameters of the module that `build` returns, a tied weight counted once."""
        raise TypeError(f"{type(self).__name__} does not count its parameters: define parameter_count()")

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Parameters without the input embeddings (tokens and positions), as scaling laws count them."""
        return self.parameter_count(vocab_size)

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Matmul FLOPs of forward and backward for one token, of captions too; for images and arrays, one sample."""
        raise TypeError(f"{type(self).__name__} does not count its FLOPs: define flops_per_token()")


FAMILIES = Registry("model family", ModelConfig, package="bigtrain.models.families", tag="arch", where="model.arch")
"""All model families by their `arch`. One of a user's own comes with --plugin FILE."""


@cache
def _presets() -> dict[str, dict[str, Any]]:
    text = Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return presets


def presets() -> list[str]:
    """The names of all presets."""
    return sorted(_presets())


def preset(name: str) -> dict[str, Any]:
    """The keys of `model` that the preset `name` stands for; a new dict, to be overridden at will.

    Raises:
        UserError: There is no such preset.
    """
    if name not in _presets():
        near = nearest(name, _presets())
        hint = f"Did you mean {near!r}? " if near else ""
        raise UserError(f"unknown preset {name!r}", "model.preset", f"{hint}presets: {', '.join(presets())}")
    return dict(_presets()[name])
