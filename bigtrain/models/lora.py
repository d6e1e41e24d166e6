"""The linear layer of LoRA, and the placing of adapted layers in a decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.adapter import AdapterConfig
from bigtrain.models.layers import Linear, cast, local


class LoRALinear(Linear):
    """x (..., in) -> x W^T + bias + scale * (x A^T) B^T, with W and bias frozen.

    Under tensor parallelism this rank's part of the product is added to its part of x W^T before ranks exchange
    anything: where outputs are split, B is; where inputs are split, A is, and the sum over ranks sums both products.
    """

    is_on: bool = True
    """Whether the product is added; without it the layer is the frozen one."""

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
    """Freeze a decoder's parameters, and put adapted layers in place of the targets."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Linear) and name in adapter.targets:
                setattr(parent, name, adapter.adapted(module))
