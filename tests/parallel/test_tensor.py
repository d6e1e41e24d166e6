"""Parts of matrices on several ranks compute what the whole matrices do, whichever way they are stored."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bigtrain.models.config import FAMILIES
from bigtrain.models.init import initialise
from bigtrain.models.loss import VocabularyPart, chunked_cross_entropy
from bigtrain.parallel import tensor as tensor_file
from bigtrain.parallel.apply import build_parallel_model
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks, build_mesh
from bigtrain.parallel.tensor import Split, TensorGroup, chunk, split, sum_gradients_as_they_come
from bigtrain.testing.ranks import RankPool

MODEL = {"arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 56, "context": 8}
VOCABULARY = 61
SAME = 1e-6
"""Relative; FP64 is not at hand where parameters are FP32."""


def whole_model(keys: dict[str, Any]) -> Any:
    model = FAMILIES["llama"](**MODEL, **keys).build(VOCABULARY)
    initialise(model, seed=3)
    return model


def split_model(keys: dict[str, Any], sequence_parallel: bool = True) -> tuple[Any, Split]:
    """The same model in plain tensors over all ranks."""
    group = cast(dist.ProcessGroup, dist.group.WORLD)
    with torch.device("meta"):
        model = FAMILIES["llama"](**MODEL, **keys).build(VOCABULARY)
    made = split(model, TensorGroup(group, sequence_parallel, loss_parallel=True), mesh=None)
    model.to_empty(device="cpu")
    initialise(model, seed=3, parts=made.parts)
    sum_gradients_as_they_come(model, made.partial, group)
    return model, made


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (3, 9), generator=generator)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": torch.ones(3, 8), "keys": torch.arange(3)}


def own_part(tensor: Tensor, name: str, made: Split) -> Tensor:
    part = made.parts.get(name)
    if part is None:
        return tensor
    return tensor[tuple(slice(at, at + size) for at, size in zip(part.offset, part.local_shape, strict=True))]


def compare_plain_tensors(keys: dict[str, Any], sequence_parallel: bool) -> list[str]:
    """What differs between the split and the whole model: initial weights, loss, gradients of two passes, logits."""
    whole, (model, made) = whole_model(keys), split_model(keys, sequence_parallel)
    expected = dict(whole.named_parameters())
    different = [f"weights of {n}" for n, p in model.named_parameters() if not p.equal(own_part(expected[n], n, made))]
    losses = []
    for each in (whole, model):
        for _ in range(2):
            loss = each(batch()).loss
            loss.backward()
        losses.append(float(loss.detach()))
    if losses[1] != pytest.approx(losses[0], rel=SAME):
        different.append("loss")
    for name, parameter in model.named_parameters():
        wanted = own_part(cast(Tensor, expected[name].grad), name, made)
        if (parameter.grad - wanted).norm() > 10 * SAME * wanted.norm():
            different.append(f"gradient of {name}")
    with torch.no_grad():
        if not torch.allclose(model.logits(batch()), whole.logits(batch()), atol=1e-5):
            different.append("logits")
    return different


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_plain_tensors_compute_what_the_whole_model_computes(ranks: RankPool, sequence_parallel: bool) -> None:
    keys = {"qk_norm": True, "dropout": 0.1, "tied": True}
    assert ranks.run(compare_plain_tensors, keys, sequence_parallel, ranks=2) == [[], []]


def shared_loss(rows: int, chunk_tokens: int) -> tuple[float, float, float]:
    """Relative differences of loss, gradient of the hidden state and gradient of the head, in FP64."""
    generator = torch.Generator().manual_seed(1)
    hidden, head = (torch.randn(size, 8, generator=generator, dtype=torch.float64) for size in (12, rows))
    targets = torch.randint(rows, (12,), generator=generator)
    weights = torch.rand(12, generator=generator, dtype=torch.float64)
    group = cast(dist.ProcessGroup, dist.group.WORLD)
    mine = chunk(rows, group.size(), group.rank())
    results = []
    for part, matrix in ((None, head), (VocabularyPart(group, mine.start), head[mine])):
        x, w = hidden.clone().requires_grad_(), matrix.clone().requires_grad_()
        loss, _ = chunked_cross_entropy(x, w, targets, weights, chunk_tokens, part)
        loss.backward()
        results.append([loss.detach(), x.grad, w.grad])
    expected, found = results
    dist.all_reduce(found[1])
    expected[2] = expected[2][mine]
    off = [float((mine - wanted).norm() / wanted.norm()) for mine, wanted in zip(found, expected, strict=True)]
    return off[0], off[1], off[2]


@pytest.mark.parametrize(("rows", "chunk_tokens"), [(61, 5), (61, 12), (6, 5)])
def test_a_shared_head_gives_the_loss_of_the_whole_one(ranks: RankPool, rows: int, chunk_tokens: int) -> None:
    for off in ranks.run(shared_loss, rows, chunk_tokens, ranks=3):
        assert max(off) < 1e-12


def test_shares_are_those_of_torch_chunk() -> None:
    for count in (5, 61, 64):
        shares = [chunk(count, 4, rank) for rank in range(4)]
        found = [part.stop - part.start for part in shares if part.stop > part.start]
        assert found == [len(part) for part in torch.arange(count).chunk(4)]


def test_a_parameter_that_the_plan_leaves_out_is_refused(ranks: RankPool) -> None:
    assert ranks.run(refusal, ranks=1) == ["the tensor plan has no pattern that matches norm.weight"]


def refusal() -> str:
    with torch.device("meta"):
        model: Any = FAMILIES["llama"](**MODEL).build(VOCABULARY)
    plan = {pattern: role for pattern, role in model.tensor_plan().items() if pattern != "*"} | {"layers.*": "whole"}
    model.tensor_plan = lambda: plan
    try:
        split(model, TensorGroup(cast(dist.ProcessGroup, dist.group.WORLD), True, True), mesh=None)
    except ValueError as error:
        return str(error)
    return "not refused"


def test_the_former_name_of_a_role_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    former: Any = {"*": "sequence"}
    assert tensor_file._role(former, "norm.weight") == "whole"
    assert tensor_file._role({"*": "heads"}, "norm.weight") == "heads"
    assert "is now called" in caplog.text


def places_that_differ(vocabulary: int) -> tuple[str, list[str]]:
    """How the embedding is sharded at tp2 x dp2, and parameters whose part is not where their DTensor says."""
    layout = LayoutConfig(tp=2)
    _, mesh = build_mesh(layout, Ranks.from_environment(), torch.device("cpu"))
    config = FAMILIES["llama"](**MODEL)
    built = build_parallel_model(
        config, vocabulary, layout=layout, mesh=mesh, device=torch.device("cpu"), compute_dtype=torch.float32, seed=3
    ).module
    whole = config.build(vocabulary)
    initialise(whole, seed=3)
    expected = dict(whole.named_parameters())
    different = [name for name, value in built.named_parameters() if not value.full_tensor().equal(expected[name])]
    return str([placement.dim for placement in built.embedding.weight.placements]), different


@pytest.mark.parametrize(("vocabulary", "dims"), [(61, "[1, 0]"), (64, "[0, 0]")])
def test_rows_that_tp_splits_unevenly_are_sharded_along_the_width(ranks: RankPool, vocabulary: int, dims: str) -> None:
    assert ranks.run(places_that_differ, vocabulary, ranks=4) == [(dims, [])] * 4
