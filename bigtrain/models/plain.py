"""Plain PyTorch modules as models: what a user's own module needs to train on the fsdp engine, and nothing more.

    class Config(PlainConfig):                    # the keys under `model`
        arch: Literal["mine"] = "mine"
        width: int = 64

        def build(self, vocab_size: int) -> nn.Module:
            return Mine(self.width, vocab_size)

    class Mine(PlainModel):                       # an nn.Module whose forward(batch) returns a LossSum

What the contract (`contract.Model`) asks of a family besides is here worked out from the module itself. What such a
module must not do, because its losses would differ from layout to layout, `check.check_model` finds and names.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.config import UserError
from bigtrain.models import layers
from bigtrain.models.check import example_batch
from bigtrain.models.config import Flops, ModelConfig
from bigtrain.models.contract import Batch, Init, LossSum, Normal, Ones, Zeros

__all__ = ["Batch", "Init", "LossSum", "Normal", "Ones", "PlainConfig", "PlainModel", "Zeros"]

STD = 0.02
"""Of all matrices at the start, as GPT-2's (Radford et al. 2019)."""

_MATRICES = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, layers.LayerNorm, layers.RMSNorm)


class PlainConfig(ModelConfig):
    """The keys of a plain module; counts are taken from the module that it builds."""

    is_plain: ClassVar[bool] = True

    @cached_property
    def _built(self) -> dict[int, nn.Module]:
        return {}

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters, a tied weight counted once."""
        return sum(parameter.numel() for parameter in self._on_meta(vocab_size).parameters())

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Parameters without the tables of `nn.Embedding`s."""
        module = self._on_meta(vocab_size)
        tables = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
        return self.parameter_count(vocab_size) - sum(table.numel() for table in tables)

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Three times the matmul FLOPs of a forward pass without values, for the gradients are two products for one.

        Attention is counted as the module computes it, so the causal count is the full one.
        """
        batch = {name: array[:1] for name, array in example_batch(self).items()}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._on_meta(vocab_size)(batch)
        total = 3 * counter.get_total_flops() // self.context
        return Flops(total, total)

    def _on_meta(self, vocab_size: int) -> nn.Module:
        if vocab_size not in self._built:
            with torch.device("meta"):
                self._built[vocab_size] = self.build(vocab_size)
        return self._built[vocab_size]


class PlainModel(nn.Module):
    """An nn.Module whose `forward(batch)` returns the sums of losses and weights.

    Its layers may be torch's own. In BF16 matmuls run under autocast, and embeddings give BF16.
    """

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the matmuls and of what embeddings give; set by the engine."""
        return self.__dict__.get("_compute_dtype", torch.float32)

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self.__dict__["_compute_dtype"] = dtype
        for module in self.modules():
            if type(module) is nn.Embedding:
                module.__dict__["forward"] = partial(_look_up, module, dtype)

    def __call__(self, batch: Batch) -> LossSum:
        """Run `forward` under autocast.

        Raises:
            UserError: It did not return two sums, the losses' in FP32.
        """
        device = next(self.parameters()).device.type
        lower = self.compute_dtype is not torch.float32 and device != "meta"
        with torch.autocast(device if lower else "cpu", self.compute_dtype if lower else None, enabled=lower):
            result = super().__call__(batch)
        if not isinstance(result, tuple) or len(result) not in (2, 3):
            raise UserError(
                "forward() does not return a sum of losses and a sum of weights",
                inspect.getfile(type(self).forward),
                "Return LossSum(loss, weight) of bigtrain/models/plain.py.",
            )
        if result[0].dtype != torch.float32:
            raise UserError(
                f"forward() returned a loss in {str(result[0].dtype).removeprefix('torch.')}: too coarse to be summed",
                inspect.getfile(type(self).forward),
                "Compute it in FP32: call .float() on the logits.",
            )
        return LossSum(*result)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The entries of `nn.ModuleList`s, in order, but for those that share a parameter with another module.

        They are gathered one by one under FSDP, recomputed and compiled one by one. Each must be called once a pass.
        """
        entries = list(_entries(self, ""))
        uses = Counter(id(module) for _, module in entries)
        holders: Counter[nn.Parameter] = Counter()
        for module in self.modules():
            holders.update(parameter for _, parameter in module.named_parameters(recurse=False))
        return [
            (name, module)
            for name, module in entries
            if uses[id(module)] == 1 and all(holders[parameter] == 1 for parameter in module.parameters())
        ]

    def initialisers(self) -> dict[str, Init]:
        """By the type of a parameter's module: matrices normal of std 0.02, norms one, biases zero.

        A parameter of a module of another type has no rule here: override this, and add yours to what it returns.
        """
        rules: dict[str, Init] = {}
        named = {parameter: name for name, parameter in self.named_parameters()}
        for module in self.modules():
            for own_name, parameter in module.named_parameters(recurse=False):
                name = named[parameter]
                if name in rules or not isinstance(module, (*_MATRICES, *_NORMS)):
                    continue
                if "bias" in own_name:
                    rules[name] = Zeros()
                else:
                    rules[name] = Ones() if isinstance(module, _NORMS) else Normal(STD)
        return rules


def _entries(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that are entries of a ModuleList, with their qualified names."""
    containers = (nn.ModuleList, nn.ModuleDict)
    for name, child in module.named_children():
        qualified = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) and not isinstance(child, containers):
            yield qualified, child
        else:
            yield from _entries(child, f"{qualified}.")


def _look_up(embedding: nn.Embedding, dtype: torch.dtype, indices: Tensor) -> Tensor:
    """Rows in `dtype`; on a CPU by a table in FP32, for the reason that `layers.Embedding` gives."""
    table: Tensor = embedding.weight
    if table.device.type == "cpu":
        table = table.to(torch.promote_types(table.dtype, torch.float32))
    rows: Any = F.embedding(indices, table, embedding.padding_idx)
    return rows.to(dtype)
