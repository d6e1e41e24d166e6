"""Context parallelism: each rank holds a part of every sequence, and the ranks exchange data only in attention.

Norms, MLPs, embedding and loss work on single tokens: each rank computes its own C / cp tokens, and keeps only their
activations. The two kinds differ in what the ranks exchange around attention:

ulysses: all-to-all over heads (Jacobs et al. 2023, DeepSpeed-Ulysses). Outside attention a rank has a slice of the
    sequence and all heads; inside attention it has the full sequence and a part of the heads.
all_gather: each rank gathers all keys and values for its own queries (Llama 3, Dubey et al. 2024, section 3.3.2). Later
    tokens attend to more keys. For balance the sequence is cut into 2 cp chunks, and rank r holds chunks r and
    2 cp - 1 - r. Each rank then computes (2 cp + 1) C^2 / (4 cp^2) pairs of query and key. This includes pairs that the
    causal mask hides in the diagonal chunks.

Elements that a rank sends in the forward pass of one layer, and again in the backward pass (B sequences of C tokens;
H query and K key heads of width D on a rank of the tp group):

    ulysses      (cp - 1) / cp * B * C / cp * D * (2 H + 2 max(K, cp))    two all-to-alls: one of packed queries, keys
                                                                          and values, one of the attention's output
    all_gather   (cp - 1) * B * C / cp * D * 2 K                          one all-gather of packed keys and values;
                                                                          one reduce-scatter of their gradients

So ulysses sends less as the number of ranks grows. all_gather works with any number of heads, and sends less if there
are few key heads for many query heads. Keys and values stay gathered until the backward pass; recompute gathers them
again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from bigtrain.models.contract import Batch
from bigtrain.models.flex import mask_of_documents
from bigtrain.models.layers import Attention, Mask, attend, document_mask
from bigtrain.parallel.collectives import all_gather, all_to_all, reduce_scatter
from bigtrain.parallel.config import ContextKind

ALONG_THE_SEQUENCE = ("tokens", "targets", "weights", "positions")
"""Arrays (B, C) that are split along the sequence; each rank takes its part."""


@dataclass(frozen=True)
class ContextGroup(ABC):
    """The ranks among which each sequence is split."""

    group: dist.ProcessGroup

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        return self.group.rank()

    @property
    @abstractmethod
    def chunks(self) -> tuple[int, ...]:
        """Indices of this rank's chunks of the sequence. All ranks have the same number of chunks, of equal length."""

    mask_of: Callable[[Tensor, Tensor | None], Mask] = document_mask
    """Makes a mask, in the form that suits the model, from documents (B, C) and the positions of the queries (None: all
    positions)."""

    @abstractmethod
    def mask(self, documents: Tensor, positions: Tensor) -> Any:
        """The document mask for `attend`, from the documents (B, C) of full sequences and this rank's positions."""

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool) -> Tensor:
        """`layers.attend` over full sequences, where each rank holds its part of them. Collective.

        Args:
            query: This rank's queries (B, C / cp, H, D).
            key, value: This rank's keys and values (B, C / cp, K, D).
            mask: The result of `mask`; None: causal attention without documents.

        Returns:
            The attention's output for this rank's queries (B, C / cp, H, D).
        """

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Positions of this rank's tokens in sequences of `count` tokens, int64 (C / cp,).

        Raises:
            ValueError: `count` is not a multiple of the number of chunks.
        """
        chunks = self.size * len(self.chunks)
        if count % chunks:
            raise ValueError(f"{chunks} equal chunks cannot be cut from sequences of {count} tokens")
        length = count // chunks
        return torch.cat([torch.arange(at * length, (at + 1) * length, device=device) for at in self.chunks])

    def part(self, batch: Batch) -> Batch:
        """This rank's part of a batch of full sequences, with the array `sequence_positions` added.

        The entry `mask` replaces `documents`.
        """
        mine = self.positions(batch["tokens"].shape[1], batch["tokens"].device)
        part = {name: array[:, mine] if name in ALONG_THE_SEQUENCE else array for name, array in batch.items()}
        documents = part.pop("documents", None)
        if documents is not None:
            part["mask"] = self.mask(documents, mine)
        return part | {"sequence_positions": mine}


class AllToAll(ContextGroup):
    """The kind `ulysses`: all-to-all over heads."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """See `ContextGroup.chunks`: one contiguous slice of the sequence."""
        return (self.rank,)

    def mask(self, documents: Tensor, positions: Tensor) -> Any:
        """See `ContextGroup.mask`: a mask of all queries, because a rank's heads see the full sequence."""
        return self.mask_of(documents, None)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool) -> Tensor:
        """See `ContextGroup.attend`.

        If there are fewer key heads than ranks, key heads are repeated before they are sent, so that each rank receives
        the key head of its queries. The gradients of the copies are summed. This supports Llama shapes of which tp
        leaves one key head per rank.
        """
        copies = max(1, self.size // key.shape[2])
        if copies > 1:
            key, value = key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2)
        by_rank = [heads.unflatten(2, (self.size, -1)) for heads in (query, key, value)]
        packed = torch.cat(by_rank, dim=3).flatten(2, 3)
        counts = [heads.shape[3] for heads in by_rank]
        query, key, value = cast(Tensor, _Exchange.apply(packed, self.group, 2, 1)).split(counts, dim=2)
        return cast(Tensor, _Exchange.apply(attend(query, key, value, mask, causal), self.group, 1, 2))


class AllGather(ContextGroup):
    """The kind `all_gather`: each rank gathers all keys and values."""

    @property
    def chunks(self) -> tuple[int, ...]:
        """See `ContextGroup.chunks`: two chunks, chosen so that all ranks have equal work under a causal mask."""
        return self.rank, 2 * self.size - 1 - self.rank

    def mask(self, documents: Tensor, positions: Tensor) -> Any:
        """See `ContextGroup.mask`: a tuple of two masks, of each chunk's queries and the keys up to the chunk's end."""
        length = len(positions) // 2
        ends = [(chunk + 1) * length for chunk in self.chunks]
        parts = zip(ends, positions.split(length), strict=True)
        return tuple(self.mask_of(documents[:, :end], queries) for end, queries in parts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool) -> Tensor:
        """See `ContextGroup.attend`. The queries of a chunk attend to keys up to the chunk's end."""
        keys, values = cast(Tensor, _GatherChunks.apply(torch.cat((key, value), dim=2), self.group)).chunk(2, dim=2)
        length = query.shape[1] // 2
        attended = []
        for chunk, queries, rows in zip(self.chunks, query.split(length, dim=1), mask or (None, None), strict=True):
            end = (chunk + 1) * length
            # The last query sees the last key. PyTorch can use its flash kernel with this bias, but not with the same
            # mask as a tensor. A compiled block runs this loop uncompiled, because the compiler cannot create the bias.
            seen = _lower_right(length, end) if rows is None else rows
            attended.append(attend(queries, keys[:, :end], values[:, :end], seen))
        return torch.cat(attended, dim=1)


KINDS: dict[ContextKind, type[ContextGroup]] = {"ulysses": AllToAll, "all_gather": AllGather}


def share_sequences(model: nn.Module, kind: ContextKind, group: dist.ProcessGroup) -> ContextGroup:
    """Apply context parallelism to each attention layer of a model, in place.

    Returns:
        The context-parallel group, which takes this rank's part of each batch.

    Raises:
        ValueError: The model has no `layers.Attention`, or one that is not causal.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if not layers or not all(layer.causal for layer in layers):
        raise ValueError(
            "context parallelism supports only models whose tokens interact only in causal layers.Attention"
        )

    def mask_of(documents: Tensor, queries: Tensor | None) -> Mask:
        width, dtype = layers[0].head_width, cast(Any, model).compute_dtype
        return mask_of_documents(documents, queries, head_width=width, dtype=dtype)

    context = KINDS[kind](group, mask_of)
    for layer in layers:
        layer.attend = context.attend
    return context


def _lower_right(queries: int, keys: int) -> Tensor:
    """torch's `causal_lower_right` bias, created outside of dispatch modes, in which its constructor fails.

    Selective recompute sets such a mode.
    """
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


def _exchange(x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
    """All-to-all: split `x` along dimension `split`, and concatenate the received parts along `join`, in rank order."""
    parts = x.unflatten(split, (group.size(), -1)).movedim(split, 0).contiguous()
    received = torch.empty_like(parts)
    all_to_all(received, parts, group=group)
    return received.movedim(0, join).flatten(join, join + 1)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.options = group, join, split
        return _exchange(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.options), None, None, None


class _GatherChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Gather both chunks of all ranks, (B, C / cp, ...) each, to (B, C, ...) in the order of the sequence."""
        ctx.group = group
        parts = x.new_empty((group.size() * x.shape[0], *x.shape[1:]))
        all_gather(parts, x.contiguous(), group=group)
        heads, tails = parts.unflatten(0, (group.size(), -1)).chunk(2, dim=2)
        return torch.cat((*heads.unbind(), *reversed(tails.unbind())), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.group.size()
        chunks = grad.chunk(2 * ranks, dim=1)
        parts = torch.cat([torch.cat((chunks[rank], chunks[-1 - rank]), dim=1) for rank in range(ranks)])
        mine = parts.new_empty((grad.shape[0], *parts.shape[1:]))
        reduce_scatter(mine, parts, group=ctx.group)
        return mine, None
