"""Adapters: small trained parameters beside the frozen weights of a model's linear layers. Free of torch.

An adapter is one file in adapters/, chosen by `model.adapter`. A family that has the key needs nothing else: shapes,
roles under tensor parallelism, first values and export follow from the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from bigtrain.config import Registry, Section
from bigtrain.models.config import TensorRole

if TYPE_CHECKING:
    from torch import Tensor

    from bigtrain.models.contract import Init
    from bigtrain.models.layers import Linear

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
"""The linear layers of each block of a native decoder, by the last part of their qualified names."""
SPLIT_BY_ROWS: frozenset[str] = frozenset(("output", "down"))
"""Layers whose inputs tensor parallelism splits; the outputs of the others are."""


class AdapterConfig(Section):
    """Base of the adapters. All parameters of the model but the adapter's own are frozen."""

    own: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that it adds to a layer, in their order in the module; neither weight nor bias."""

    name: str
    """Which adapter: a file of bigtrain/models/adapters, or the name of a plugin's class."""
    targets: tuple[str, ...] = ("query", "value")
    """The linear layers of each block that are adapted: query, key, value, output, gate, up, down. Of a model of
    `arch: hf` by the names that peft's `target_modules` has, such as q_proj."""

    def shapes(self, weight: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The parameters of an adapted layer, by `own` names.

        Args:
            weight: Shape of its frozen matrix (outputs, inputs).
        """
        raise TypeError(f"{type(self).__name__} does not say what it adds: define shapes()")

    def roles(self, by_rows: bool) -> dict[str, TensorRole]:
        """How these lie where ranks share the matrix: split by its inputs (`by_rows`), or by its outputs."""
        raise TypeError(f"{type(self).__name__} does not say how it is split: define roles()")

    def initialiser(self, own: str, shape: tuple[int, ...]) -> Init:
        """The first values of one of these; the adapted layer must begin as the frozen one."""
        raise TypeError(f"{type(self).__name__} does not say how it begins: define initialiser()")

    def adapted(self, linear: Linear) -> Linear:
        """The layer that takes a layer's place: its weight and bias under their names, and the adapter's parameters."""
        raise TypeError(f"{type(self).__name__} does not build its layer: define adapted()")

    def beside(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """What is added to the output of a layer of transformers for its input x (..., inputs), by `own` names."""
        raise TypeError(f"{type(self).__name__} does not support arch 'hf': define beside()")

    def merged(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The matrix of a layer without adapter that computes the same, in the dtype of `weight`."""
        raise TypeError(f"{type(self).__name__} cannot be merged: define merged()")

    def is_own(self, name: str) -> bool:
        """Whether a parameter, by its qualified name, is the adapter's."""
        return name.rpartition(".")[2] in self.own

    def tensor_plan(self) -> dict[str, TensorRole]:
        """The roles of the adapter's parameters, by patterns over qualified names."""
        return {
            f"layers.*.{target}.{own}": role
            for target in self.targets
            for own, role in self.roles(target in SPLIT_BY_ROWS).items()
        }


ADAPTERS = Registry("adapter", AdapterConfig, package="bigtrain.models.adapters", where="model.adapter.name")
"""All adapters by `model.adapter.name`."""
