"""Adapters: small trained parameters beside the frozen weights of linear layers. Does not import torch.

An adapter is one file in adapters/, chosen by `model.adapter`. A family only needs this key: the adapter defines its
shapes, its roles under tensor parallelism, its initial values, and its export.
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
"""Layers whose inputs tensor parallelism splits; it splits the outputs of the others."""


class AdapterConfig(Section):
    """Base class of adapters. Only the adapter's own parameters are trained; all others are frozen."""

    own: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that the adapter adds to a layer, in module order; they must not be weight or bias."""

    name: str
    """The adapter: name of a file in bigtrain/models/adapters, or of a plugin's class."""
    targets: tuple[str, ...] = ("query", "value")
    """The linear layers of each block that are adapted: query, key, value, output, gate, up, down. For `arch: hf`,
    names as in peft's `target_modules`, such as q_proj."""

    def shapes(self, weight: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's parameters in one layer, by the names in `own`.

        Args:
            weight: Shape (outputs, inputs) of the layer's frozen matrix.
        """
        raise TypeError(f"{type(self).__name__} does not say what it adds: define shapes()")

    def roles(self, by_rows: bool) -> dict[str, TensorRole]:
        """Tensor-parallel roles of the adapter's parameters, by the names in `own`.

        Args:
            by_rows: Whether the inputs of the layer's frozen matrix are split; otherwise its outputs are.
        """
        raise TypeError(f"{type(self).__name__} does not say how it is split: define roles()")

    def initialiser(self, own: str, shape: tuple[int, ...]) -> Init:
        """Initialisation rule of one of the adapter's parameters.

        An adapted layer must initially compute the same as the frozen layer.

        Args:
            own: Name of the parameter, one of `own`.
            shape: Its full (unsharded) shape.
        """
        raise TypeError(f"{type(self).__name__} does not say how it begins: define initialiser()")

    def adapted(self, linear: Linear) -> Linear:
        """The layer that replaces `linear`: it keeps the names weight and bias, and has the adapter's parameters."""
        raise TypeError(f"{type(self).__name__} does not build its layer: define adapted()")

    def beside(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """What the adapter adds to the output of a layer of a transformers model.

        Args:
            x: Input of the layer, (..., inputs).
            parameters: The adapter's parameters in this layer, by the names in `own`.
        """
        raise TypeError(f"{type(self).__name__} does not support arch 'hf': define beside()")

    def merged(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """The frozen matrix with the adapter merged into it, in the dtype of `weight`.

        A layer without an adapter computes the same with this matrix.

        Args:
            weight: The frozen matrix (outputs, inputs).
            parameters: The adapter's parameters in this layer, by the names in `own`.
        """
        raise TypeError(f"{type(self).__name__} cannot be merged: define merged()")

    def is_own(self, name: str) -> bool:
        """Whether a parameter, by its qualified name, belongs to the adapter."""
        return name.rpartition(".")[2] in self.own

    def tensor_plan(self) -> dict[str, TensorRole]:
        """Tensor-parallel roles of the adapter's parameters, by patterns over qualified names."""
        return {
            f"layers.*.{target}.{own}": role
            for target in self.targets
            for own, role in self.roles(target in SPLIT_BY_ROWS).items()
        }


ADAPTERS = Registry("adapter", AdapterConfig, package="bigtrain.models.adapters", where="model.adapter.name")
"""All adapters, by `model.adapter.name`."""
