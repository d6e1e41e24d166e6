"""The linear layer of LoRA, and the replacement of a decoder's layers by adapted ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.adapter import AdapterConfig
from bigtrain.models.layers import Linear, cast, local


class LoRALinear(Linear):
    """x (..., in) -> x W^T + bias + scale * (x A^T) B^T, with W and bias frozen.

    Under tensor parallelism, each rank adds its part of the adapter's product to its part of x W^T before any
    communication. If the layer's outputs are split, B is split. If its inputs are split, A is split, and one sum over
    the ranks completes both products.
    """

    is_on: bool = True
    """Whether the adapter's product is added; if False, the layer computes what the frozen layer computes."""

    def __init__(self, linear: Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.requires_grad_(False)
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if not self.is_on:
            return super().forward(x)
        narrow = F.linear(x, local(self.lora_a).to(x.dtype))
        added = F.linear(narrow, local(self.lora_b).to(x.dtype)) * self.scale
        weight, bias = local(self.weight).to(x.dtype), cast(self.bias, x)
        if self.leave is None:
            return F.linear(x, weight, bias) + added
        total = self.leave(F.linear(x, weight) + added)
        return total if bias is None else total + bias


def adapt(model: nn.Module, adapter: AdapterConfig) -> None:
    """Freeze all parameters of a decoder, and replace the target layers by adapted ones, in place."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Linear) and name in adapter.targets:
                setattr(parent, name, adapter.adapted(module))
