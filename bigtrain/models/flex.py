"""Document masks as blocks: FlexAttention (Dong et al. 2024) visits only the blocks of queries and keys that meet.

A dense mask costs a byte a pair of tokens and shuts the flash kernels out. A block mask says for each pair of blocks of
128 tokens whether none of its pairs is visible (it is not visited), all are (no mask is computed), or some (the rule is
asked). It is worked out here from the first and last document of each block, without a dense mask and without waiting
for the device, and it is built once a pass for all layers.

No GPU has run this code yet: on a CPU, where FlexAttention has no backward pass, its masks and its forward pass are
compared with the dense form, and tests marked `gpu` compare both passes where there is one.
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
    """What `layers.attend` takes to keep attention causal and inside documents: the one place that chooses its form.

    Args:
        documents, queries, window: As `layers.document_mask` takes them.
        head_width: Of the attention that the mask is for.
        dtype: Of its queries.
    """
    count = documents.shape[1] if queries is None else len(queries)
    if serves(documents.device, dtype, head_width, count, documents.shape[1]):
        return block_mask(documents, queries, window)
    return document_mask(documents, queries, window)


def serves(device: torch.device, dtype: torch.dtype, head_width: int, queries: int, keys: int) -> bool:
    """Whether FlexAttention is used: on CUDA, in BF16 or FP16, for heads of 16, 32, 64, 128 or 256 and whole blocks.

    FP32 stays with the dense mask, since it is there for comparisons; and so do runs that must be deterministic, since
    nobody has seen that the kernel's backward pass is.
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
    """The mask that `layers.document_mask` gives for the same arguments, as blocks; lengths are multiples of BLOCK.

    It is right for documents in any order, and visits the fewest blocks where they ascend, as those of the loader do.
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
    """The least and the largest of each block of values (B, C), each (B, blocks)."""
    low, high = values.unflatten(1, (-1, BLOCK)).aminmax(dim=2)
    return low, high


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, int32 (B, 1, Q), and their numbers first, int32 (B, 1, Q, K)."""
    numbers = blocks.int().argsort(dim=2, descending=True, stable=True)
    return blocks.sum(dim=2, dtype=torch.int32)[:, None], numbers.int()[:, None]


def attend_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> Tensor:
    """`layers.attend` with a block mask."""
    from torch.nn.attention.flex_attention import flex_attention
    from torch.utils._python_dispatch import _disable_current_modes

    heads = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": key.shape[2] != query.shape[2]}
    if torch.compiler.is_compiling() or not query.is_cuda:
        attended = flex_attention(*heads, **options)
    else:
        # Uncompiled it would hold all scores, and nothing is compiled under a dispatch mode, as selective recompute
        # sets one: so that does not see it, and computes it again.
        with _disable_current_modes():
            attended = _compiled()(*heads, **options)
    result: Tensor = attended.transpose(1, 2)
    return result


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
