"""A base class for modules that read the batch itself, and defaults derived from the structure of any module."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.models import layers
from bigtrain.models.contract import Batch, Init, LossSum, Normal, Ones, Zeros

STD = 0.02
"""Standard deviation of matrices under the default rules of `PlainModel`, as in GPT-2 (Radford et al. 2019)."""

_MATRICES = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, layers.LayerNorm, layers.RMSNorm)


class PlainModel(nn.Module):
    """An nn.Module whose `forward(batch)` returns the sums of losses and weights.

    It may use torch's own layers. In BF16, matmuls run under autocast, and embeddings return BF16.
    """

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matmuls and of the output of embeddings; the engine sets it."""
        return self.__dict__.get("_compute_dtype", torch.float32)

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self.__dict__["_compute_dtype"] = dtype
        look_up_in(self, dtype)

    def __call__(self, batch: Batch) -> LossSum:
        """Run `forward` under autocast.

        Raises:
            UserError: `forward` did not return a sum of losses in FP32 and a sum of weights.
        """
        with autocast(self, self.compute_dtype):
            result = super().__call__(batch)
        return as_sums(result, inspect.getfile(type(self).forward))

    def blocks(self) -> list[tuple[str, nn.Module]]:
        """The entries of `nn.ModuleList`s, in order, without those that share a parameter with another module.

        Each is sharded by FSDP, recomputed and compiled separately.
        """
        return list_entries(self)

    def initialisers(self) -> dict[str, Init]:
        """Rules by the type of a parameter's module: matrices are normal with std 0.02, norms one, biases zero.

        A module that does not override this method keeps the values of its `__init__`. A module that overrides it is
        built without values, which takes no memory, and each rank initialises only its own shard.
        """
        return rules_by_type(self)


def autocast(module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """An autocast context to `dtype` on the module's device; it does nothing in FP32 or on the meta device."""
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    lower = dtype is not torch.float32 and device != "meta"
    return torch.autocast(device if lower else "cpu", dtype if lower else None, enabled=lower)


def look_up_in(module: nn.Module, dtype: torch.dtype) -> None:
    """Make every `nn.Embedding` in a module return `dtype`."""
    for part in module.modules():
        if type(part) is nn.Embedding:
            if dtype is torch.float32:
                part.__dict__.pop("forward", None)
            else:
                part.__dict__["forward"] = partial(_look_up, part, dtype)


def as_sums(result: Any, where: str) -> LossSum:
    """Convert the result of a forward pass to a `LossSum`.

    Raises:
        UserError: The result is not a sum of losses in FP32 and a sum of weights.
    """
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise UserError(
            "forward() does not return a sum of losses and a sum of weights",
            where,
            "Return LossSum(loss, weight) of bigtrain/models/plain, or define loss() in Config.",
        )
    if result[0].dtype != torch.float32:
        raise UserError(
            f"forward() returned a loss in {str(result[0].dtype).removeprefix('torch.')}, whose precision is too low "
            "for sums",
            where,
            "Compute it in FP32: call .float() on the logits.",
        )
    return LossSum(*result)


def rules_by_type(module: nn.Module) -> dict[str, Init]:
    """Initialisation rules for the parameters of known layer types, by qualified name."""
    rules: dict[str, Init] = {}
    named = {parameter: name for name, parameter in module.named_parameters()}
    for part in module.modules():
        for own_name, parameter in part.named_parameters(recurse=False):
            name = named[parameter]
            if name in rules or not isinstance(part, (*_MATRICES, *_NORMS)):
                continue
            if "bias" in own_name:
                rules[name] = Zeros()
            else:
                rules[name] = Ones() if isinstance(part, _NORMS) else Normal(STD)
    return rules


def list_entries(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost entries of `nn.ModuleList`s that share no parameter with another module, with qualified names."""
    entries = list(_entries(module, ""))
    uses = Counter(id(entry) for _, entry in entries)
    holders: Counter[nn.Parameter] = Counter()
    for part in module.modules():
        for _, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            holders[parameter] += 1
    return [
        (name, entry)
        for name, entry in entries
        if uses[id(entry)] == 1 and {holders[parameter] for parameter in entry.parameters()} == {1}
    ]


def _entries(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    containers = (nn.ModuleList, nn.ModuleDict)
    for name, child in module.named_children():
        qualified = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) and not isinstance(child, containers):
            yield qualified, child
        else:
            yield from _entries(child, f"{qualified}.")


def _look_up(embedding: nn.Embedding, dtype: torch.dtype, indices: Tensor) -> Tensor:
    """Look up rows in `dtype`; on a CPU in an FP32 table, for the reason given in `layers.Embedding`."""
    table: Tensor = embedding.weight
    if table.device.type == "cpu":
        table = table.to(torch.promote_types(table.dtype, torch.float32))
    rows: Any = F.embedding(indices, table, embedding.padding_idx)
    return rows.to(dtype)
