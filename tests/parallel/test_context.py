"""Attention of shared sequences is that of whole ones: values and gradients, for each kind, shape and mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.models.config import FAMILIES
from bigtrain.models.layers import attend, document_mask
from bigtrain.parallel.config import ContextKind
from bigtrain.parallel.context import KINDS, AllGather, ContextGroup, share_sequences
from bigtrain.testing.ranks import RankPool

SAME = 1e-12
"""Relative, in FP64."""
BATCH, CONTEXT, HEAD_WIDTH = 3, 24, 8
EACH_KIND = pytest.mark.parametrize("kind", ["ulysses", "all_gather"])


@dataclass(frozen=True)
class Case:
    """The shape of an attention layer."""

    kind: ContextKind
    heads: int = 8
    kv_heads: int = 4
    documents: bool = False
    contiguous: bool = False
    """A planted fault: chunks are dealt otherwise than they are gathered."""


def inputs(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries, keys, values; the gradient of what they give; documents. Whole, and equal on all ranks."""
    generator = torch.Generator().manual_seed(1)
    counts = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    drawn = [
        torch.randn(BATCH, CONTEXT, count, HEAD_WIDTH, generator=generator, dtype=torch.float64) for count in counts
    ]
    documents = (torch.rand(BATCH, CONTEXT, generator=generator) < 0.2).cumsum(dim=1)
    return drawn[:3], drawn[3], documents


class Contiguous(AllGather):
    """Deals each rank two chunks in a row."""

    @property
    def chunks(self) -> tuple[int, ...]:
        return 2 * self.rank, 2 * self.rank + 1


def group_of(kind: ContextKind) -> ContextGroup:
    return KINDS[kind](cast(dist.ProcessGroup, dist.group.WORLD))


def compare(case: Case) -> list[float]:
    """Relative differences of the result and of the gradients of queries, keys and values on this rank."""
    whole, upstream, documents = inputs(case)
    for tensor in whole:
        tensor.requires_grad_()
    expected = attend(*whole, document_mask(documents) if case.documents else None)
    expected.backward(upstream)
    shared = group_of(case.kind)
    if case.contiguous:
        shared = Contiguous(shared.group)
    mine = shared.positions(CONTEXT, torch.device("cpu"))
    own = [tensor.detach()[:, mine].requires_grad_() for tensor in whole]
    mask = shared.mask(documents, mine) if case.documents else None
    found = shared.attend(own[0], own[1], own[2], mask, True)
    found.backward(upstream[:, mine])
    pairs = [(found.detach(), expected.detach()[:, mine])]
    pairs += [(cast(Tensor, a.grad), cast(Tensor, b.grad)[:, mine]) for a, b in zip(own, whole, strict=True)]
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


@EACH_KIND
@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"),
    [
        pytest.param(4, 8, 4, id="grouped queries"),
        pytest.param(4, 4, 4, id="kv_heads equal to heads"),
        pytest.param(4, 8, 2, id="fewer key heads than ranks"),
        pytest.param(3, 6, 1, id="one key head"),
        pytest.param(1, 8, 4, id="one rank"),
    ],
)
def test_attention_of_shared_sequences_is_that_of_whole_ones(
    ranks: RankPool, kind: ContextKind, size: int, heads: int, kv_heads: int
) -> None:
    for documents in (False, True):
        for off in ranks.run(compare, Case(kind, heads, kv_heads, documents), ranks=size):
            assert max(off) < SAME


def test_the_comparison_sees_chunks_that_are_dealt_otherwise_than_gathered(ranks: RankPool) -> None:
    assert max(max(off) for off in ranks.run(compare, Case("all_gather", contiguous=True), ranks=4)) > 0.1


def places(kind: ContextKind) -> tuple[list[int], list[int]]:
    """This rank's positions, and how many keys each of its queries may see."""
    shared = group_of(kind)
    mine = shared.positions(CONTEXT, torch.device("cpu"))
    masks = rows(shared.mask(torch.zeros(1, CONTEXT, dtype=torch.int64), mine))
    return mine.tolist(), [count for mask in masks for count in mask.sum(dim=-1)[0, 0].tolist()]


def rows(mask: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The mask of each of a rank's chunks."""
    return mask if isinstance(mask, tuple) else (mask,)


@EACH_KIND
def test_each_token_lies_on_one_rank(ranks: RankPool, kind: ContextKind) -> None:
    held = [mine for mine, _ in ranks.run(places, kind, ranks=4)]
    assert sorted(place for mine in held for place in mine) == list(range(CONTEXT))
    assert len({len(mine) for mine in held}) == 1


def test_head_and_tail_chunks_give_each_rank_as_many_keys_to_see(ranks: RankPool) -> None:
    found = ranks.run(places, "all_gather", ranks=4)
    assert [seen for mine, seen in found] == [[place + 1 for place in mine] for mine, _ in found]
    assert len({sum(seen) for _, seen in found}) == 1


def batch_part(kind: ContextKind) -> dict[str, Tensor]:
    whole = torch.arange(BATCH * CONTEXT).reshape(BATCH, CONTEXT)
    names = ("tokens", "targets", "weights", "positions", "documents")
    return group_of(kind).part(dict.fromkeys(names, whole) | {"keys": torch.arange(BATCH)})


@EACH_KIND
def test_a_rank_takes_its_part_of_all_that_has_tokens_and_keeps_the_rest(ranks: RankPool, kind: ContextKind) -> None:
    for part in ranks.run(batch_part, kind, ranks=2):
        mine = part["sequence_positions"]
        for name in ("tokens", "targets", "weights", "positions"):
            assert part[name].tolist() == (torch.arange(BATCH)[:, None] * CONTEXT + mine).tolist()
        assert part["keys"].tolist() == list(range(BATCH))
        assert "documents" not in part
        shapes = [tuple(mask.shape) for mask in rows(part["mask"])]
        quarter = CONTEXT // 4
        ends = [int(mine[at]) + 1 for at in (quarter - 1, -1)]
        chunks = [(BATCH, 1, quarter, end) for end in ends]
        assert shapes == ([(BATCH, 1, CONTEXT, CONTEXT)] if kind == "ulysses" else chunks)


def refusals() -> list[str]:
    said = []
    images = FAMILIES["vit"](image_size=8).build(10)
    for attempt in (
        lambda: group_of("all_gather").positions(CONTEXT - 2, torch.device("cpu")),
        lambda: share_sequences(images, "ulysses", cast(dist.ProcessGroup, dist.group.WORLD)),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_cannot_be_shared_is_refused(ranks: RankPool) -> None:
    for length, model in ranks.run(refusals, ranks=2):
        assert length == "4 equal chunks cannot be cut from sequences of 22 tokens"
        assert "causal" in model
