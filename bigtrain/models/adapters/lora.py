"""LoRA (Hu et al. 2022): each adapted matrix W becomes W + scale * B A, where B and A are narrow matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Gt

from bigtrain.models.adapter import ADAPTERS, AdapterConfig
from bigtrain.models.config import TensorRole

if TYPE_CHECKING:
    from torch import Tensor

    from bigtrain.models.contract import Init
    from bigtrain.models.layers import Linear


@ADAPTERS.register
class LoRAConfig(AdapterConfig):
    """LoRA as in peft, without dropout: W x + alpha / rank * B (A x), where B is initially zero."""

    own: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")

    name: Literal["lora"] = "lora"
    rank: Annotated[int, Ge(1)] = 8
    """Number of rows of A and of columns of B."""
    alpha: Annotated[float, Gt(0)] = 16.0
    """The product B A is scaled by alpha / rank."""

    @property
    def scale(self) -> float:
        """The factor of the product B A."""
        return self.alpha / self.rank

    def shapes(self, weight: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes of A, (rank, inputs), and B, (outputs, rank)."""
        outputs, inputs = weight
        return {"lora_a": (self.rank, inputs), "lora_b": (outputs, self.rank)}

    def roles(self, by_rows: bool) -> dict[str, TensorRole]:
        """See `AdapterConfig.roles`. A or B is split like W. The other is not split, and its gradients are summed over
        the ranks ("heads")."""
        return {"lora_a": "row", "lora_b": "heads"} if by_rows else {"lora_a": "heads", "lora_b": "column"}

    def initialiser(self, own: str, shape: tuple[int, ...]) -> Init:
        """See `AdapterConfig.initialiser`. A is normal with variance 1 / (3 * inputs), as in peft's uniform
        distribution; B is zero."""
        from bigtrain.models.contract import Normal, Zeros

        return Zeros() if own == "lora_b" else Normal(1.0 / math.sqrt(3 * shape[1]))

    def adapted(self, linear: Linear) -> Linear:
        """See `AdapterConfig.adapted`."""
        from bigtrain.models.lora import LoRALinear

        return LoRALinear(linear, self.rank, self.scale)

    def beside(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """See `AdapterConfig.beside`: scale * (x A^T) B^T."""
        from torch.nn.functional import linear

        return self.scale * linear(linear(x, parameters["lora_a"]), parameters["lora_b"])

    def merged(self, weight: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """W + scale * B A; the product in FP64."""
        product = parameters["lora_b"].double() @ parameters["lora_a"].double()
        return (weight.double() + self.scale * product).to(weight.dtype)
