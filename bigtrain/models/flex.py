"""Document masks for FlexAttention (Dong et al. 2024), which skips blocks of queries and keys without a visible pair.

A dense mask costs one byte per pair of tokens and excludes the flash kernels. A block mask classifies each pair of
blocks of 128 tokens by its visible pairs of tokens: none (the block is skipped), all (no mask is computed), or some
(the mask function is evaluated). It is computed from the first and last document of each block, without a dense mask
and without a host synchronisation, once per forward pass for all layers.

This code has not run on a GPU yet. Tests on a CPU, where FlexAttention has no backward pass, compare its masks and its
forward pass with the dense form. Tests marked `gpu` compare both passes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigtrain.models.layers import Mask, document_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
HEAD_WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


def mask_of_documents(
    documents: Tensor,
    queries: Tensor | None = None,
    *,
    head_width: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> Mask:
    """The mask for `layers.attend` that keeps attention causal and inside documents, as blocks if supported.

    Args:
        documents, queries, window: See `layers.document_mask`.
        head_width: Width of one attention head.
        dtype: Dtype of the queries.
    """
    count = documents.shape[1] if queries is None else len(queries)
    if serves(documents.device, dtype, head_width, count, documents.shape[1]):
        return block_mask(documents, queries, window)
    return document_mask(documents, queries, window)


def serves(device: torch.device, dtype: torch.dtype, head_width: int, queries: int, keys: int) -> bool:
    """Whether FlexAttention is used.

    It needs CUDA, BF16 or FP16, a head width of 16, 32, 64, 128 or 256, and numbers of queries and keys that are
    multiples of `BLOCK`. FP32, which serves for comparisons, uses the dense mask. So do deterministic runs, because it
    is not established that the kernel's backward pass is deterministic.
    """
    return (
        device.type == "cuda"
        and dtype in DTYPES
        and head_width in HEAD_WIDTHS
        and queries % BLOCK == 0
        and keys % BLOCK == 0
        and not torch.are_deterministic_algorithms_enabled()
    )


def block_mask(documents: Tensor, queries: Tensor | None = None, window: int | None = None) -> BlockMask:
    """The mask of `layers.document_mask` for the same arguments, as blocks. Lengths must be multiples of `BLOCK`.

    The mask is correct for documents in any order. It skips the most blocks if document indices ascend, as they do in
    the loader's batches.
    """
    from torch.nn.attention.flex_attention import BlockMask

    places = torch.arange(documents.shape[1], device=documents.device)
    asked_from = places if queries is None else queries
    reach = documents.shape[1] if window is None else window
    asking = documents[:, asked_from]

    def visible(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (
            (asking[sequence, query] == documents[sequence, key])
            & (asked_from[query] >= key)
            & (asked_from[query] < key + reach)
        )

    low_query, high_query = (edge[:, :, None] for edge in _edges(asking))
    low_key, high_key = (edge[:, None] for edge in _edges(documents))
    first_query, last_query = (edge[:, :, None] for edge in _edges(asked_from[None]))
    first_key, last_key = (edge[:, None] for edge in _edges(places[None]))
    meet = (low_query <= high_key) & (low_key <= high_query) & (last_query >= first_key)
    meet &= first_query < last_key + reach
    whole = (low_query == high_query) & (low_key == high_key) & (low_query == low_key) & (first_query >= last_key)
    whole &= last_query < first_key + reach
    return BlockMask.from_kv_blocks(*_listed(meet & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible)


def _edges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over each block of values (B, C), each (B, blocks)."""
    low, high = values.unflatten(1, (-1, BLOCK)).aminmax(dim=2)
    return low, high


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of key blocks of each query block, int32 (B, 1, Q), and the indices of key blocks, int32 (B, 1, Q, K).

    The selected key blocks come first among the indices.

    Args:
        blocks: Boolean (B, Q, K), true for the selected pairs of query block and key block.
    """
    numbers = blocks.int().argsort(dim=2, descending=True, stable=True)
    return blocks.sum(dim=2, dtype=torch.int32)[:, None], numbers.int()[:, None]


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """The implementation of `layers.attend` for a block mask."""
    from torch.nn.attention.flex_attention import flex_attention
    from torch.utils._python_dispatch import _disable_current_modes

    heads = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": key.shape[2] != query.shape[2]}
    if torch.compiler.is_compiling() or not query.is_cuda:
        attended = flex_attention(*heads, **options)
    else:
        # Uncompiled, flex_attention would materialise all scores. torch does not compile under a dispatch mode, which
        # selective recompute sets, so modes are disabled here. Selective recompute then does not see the operator, and
        # recomputes it.
        with _disable_current_modes():
            attended = _compiled()(*heads, **options)
    result: Tensor = attended.transpose(1, 2)
    return result


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
