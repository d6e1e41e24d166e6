"""The block form of document masks is the dense one: its rule, its blocks and what attention gathers with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigtrain.models.config import FAMILIES
from bigtrain.models.decoder import DecoderModel
from bigtrain.models.flex import BLOCK, attend_blocks, block_mask, mask_of_documents, serves
from bigtrain.models.init import initialise
from bigtrain.models.layers import attend, document_mask

SAME = {torch.float64: 1e-12, torch.float32: 2e-6}
"""Relative, of what attention gathers: both sum the same numbers in another order."""
SAME_ON_A_GPU = 2e-2
"""In BF16, whose numbers have 8 bits: the band of PyTorch's own tests of FlexAttention."""


def documents_of(batch: int, tokens: int, seed: int, ascending: bool = True) -> Tensor:
    """Random documents, a few of them long, as the loader numbers them; or in any order."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(batch, tokens, generator=generator) < torch.tensor([[0.002], [0.05]]).repeat(batch, 1)[:batch]
    begins[:, 0] = True
    documents = begins.cumsum(1).int() - 1
    return documents if ascending else documents[:, torch.randperm(tokens, generator=generator)]


def dense(mask, tokens: int) -> Tensor:
    """What the kernel lets through: whole blocks as they are, of others what the rule says, of the rest nothing."""
    batch, _, rows, _ = mask.kv_indices.shape
    seen = torch.zeros(batch, rows * BLOCK, tokens, dtype=torch.bool)
    place = torch.arange(tokens)
    for sequence in range(batch):
        for row in range(rows):
            queries = torch.arange(row * BLOCK, (row + 1) * BLOCK)
            partial = mask.kv_indices[sequence, 0, row, : mask.kv_num_blocks[sequence, 0, row]]
            whole = mask.full_kv_indices[sequence, 0, row, : mask.full_kv_num_blocks[sequence, 0, row]]
            assert not set(partial.tolist()) & set(whole.tolist())
            for column in partial.tolist():
                keys = place[column * BLOCK : (column + 1) * BLOCK]
                rule = mask.mask_mod(torch.tensor(sequence), torch.tensor(0), queries[:, None], keys[None])
                seen[sequence, queries[0] : queries[-1] + 1, keys[0] : keys[-1] + 1] = rule
            for column in whole.tolist():
                seen[sequence, queries[0] : queries[-1] + 1, column * BLOCK : (column + 1) * BLOCK] = True
    return seen


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.booleans(), st.booleans(), st.sampled_from([None, 40, 128, 300]))
def test_blocks_let_through_what_the_dense_mask_does(
    seed: int, blocks: int, ascending: bool, some: bool, window: int | None
) -> None:
    tokens = blocks * BLOCK
    documents = documents_of(2, tokens, seed, ascending)
    queries = None
    if some:
        first = seed % blocks
        queries = torch.arange(first * BLOCK, tokens)[: BLOCK * (1 + seed % 2)]
    expected = document_mask(documents, queries, window)[:, 0]
    assert torch.equal(dense(block_mask(documents, queries, window), tokens), expected)


def test_no_block_is_visited_in_vain_and_whole_ones_ask_no_rule() -> None:
    documents = torch.tensor([[0] * 2 * BLOCK + [1] * 2 * BLOCK])
    mask = block_mask(documents)
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 1, 1, 1]
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 0, 1]
    assert mask.full_kv_indices[0, 0, [1, 3], 0].tolist() == [0, 2]


def random_heads(tokens: int, queries: int, kv_heads: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, queries, 4, 32), (2, tokens, kv_heads, 32), (2, tokens, kv_heads, 32)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("dtype", "kv_heads"),
    [(torch.float64, 2), pytest.param(torch.float32, 4, marks=pytest.mark.slow)],
)
def test_attention_by_blocks_gathers_what_the_dense_form_does(dtype: torch.dtype, kv_heads: int) -> None:
    tokens = 3 * BLOCK
    documents = documents_of(2, tokens, seed=1)
    for queries in (None, torch.arange(BLOCK, 2 * BLOCK)):
        heads = random_heads(tokens, tokens if queries is None else BLOCK, kv_heads, dtype)
        expected = attend(*heads, document_mask(documents, queries))
        found = attend(*heads, block_mask(documents, queries))
        assert found.shape == expected.shape
        assert off(found, expected) < SAME[dtype]


def decoder() -> DecoderModel:
    config = FAMILIES["llama"](layers=2, width=128, heads=4, kv_heads=2, context=2 * BLOCK)
    model = config.build(61)
    initialise(model, seed=3)
    assert isinstance(model, DecoderModel)
    return model


def test_a_decoder_reads_blocks_as_it_reads_documents() -> None:
    model, documents = decoder().requires_grad_(False), documents_of(2, 2 * BLOCK, seed=0)
    tokens = torch.randint(0, 61, (2, 2 * BLOCK), generator=torch.Generator().manual_seed(2))
    expected = model.logits({"tokens": tokens, "documents": documents})
    assert off(model.logits({"tokens": tokens, "mask": block_mask(documents)}), expected) < 1e-5


@pytest.mark.slow
def test_compiled_blocks_read_every_batchs_mask_by_one_compilation() -> None:
    plain, compiled = decoder().requires_grad_(False), decoder().requires_grad_(False)
    tokens = torch.randint(0, 61, (2, 2 * BLOCK), generator=torch.Generator().manual_seed(2))
    compilations = first = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    for block in compiled.layers.values():
        block.compile(backend=count)
    for seed in range(3):
        documents = documents_of(2, 2 * BLOCK, seed)
        expected = plain.logits({"tokens": tokens, "documents": documents})
        assert off(compiled.logits({"tokens": tokens, "mask": block_mask(documents)}), expected) < 1e-5
        first = compilations if seed == 0 else first
    assert compilations == first > 0


@pytest.fixture
def any_order() -> Iterator[None]:
    """As a run on a GPU has it by default: other tests may have asked this process for one order."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("any_order")
def test_the_dense_form_stays_where_blocks_cannot_serve() -> None:
    documents = documents_of(1, 2 * BLOCK, seed=0)
    assert isinstance(mask_of_documents(documents, head_width=64, dtype=torch.bfloat16), Tensor)
    asked = {
        "device": torch.device("cuda"), "dtype": torch.bfloat16, "head_width": 64, "queries": 256, "keys": 512,
    }  # fmt: skip
    assert serves(**asked)
    for change in (
        {"device": torch.device("cpu")}, {"dtype": torch.float32}, {"head_width": 80}, {"head_width": 8},
        {"queries": 200}, {"keys": 200},
    ):  # fmt: skip
        assert not serves(**{**asked, **change})
    torch.use_deterministic_algorithms(True)
    assert not serves(**asked)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_on_a_gpu_both_passes_are_those_of_the_dense_form(kv_heads: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    documents = documents_of(2, 4 * BLOCK, seed=5).cuda()
    mask = mask_of_documents(documents, head_width=32, dtype=torch.bfloat16)
    assert not isinstance(mask, Tensor)
    heads = random_heads(4 * BLOCK, 4 * BLOCK, kv_heads, torch.bfloat16, "cuda")
    upstream = torch.randn_like(heads[0])
    exact = [tensor.double().requires_grad_() for tensor in heads]
    expected = attend(*exact, document_mask(documents))
    expected.backward(upstream.double())
    leaves = [tensor.requires_grad_() for tensor in heads]
    found = attend_blocks(*leaves, mask)
    found.backward(upstream)
    assert off(found, expected) < SAME_ON_A_GPU
    for mine, reference in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert off(mine.grad, reference.grad) < SAME_ON_A_GPU


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_a_decoder_trains_with_blocks_as_with_the_dense_mask(recompute: str, compiled: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    from bigtrain.parallel.recompute import recompute_blocks

    documents = documents_of(2, 2 * BLOCK, seed=6).cuda()
    tokens = torch.randint(0, 61, (2, 2 * BLOCK), generator=torch.Generator().manual_seed(2)).cuda()
    batch = {"tokens": tokens, "targets": tokens, "weights": torch.ones(2, 2 * BLOCK, device="cuda")}
    gradients = []
    for mask in (document_mask(documents), block_mask(documents)):
        model = decoder().cuda()
        model.compute_dtype = torch.bfloat16
        blocks = [block for _, block in model.blocks()]
        recompute_blocks(blocks, recompute, compiled=compiled)  # type: ignore[arg-type]
        if compiled:
            for block in blocks:
                block.compile()
        model({**batch, "mask": mask}).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert off(gradients[1][name], expected) < 5 * SAME_ON_A_GPU, name
