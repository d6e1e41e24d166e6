"""The sums of a step by source, against the plain form."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bigtrain.models.contract import LossSum
from bigtrain.models.hf_tasks import Example, loss_sum
from bigtrain.models.sums import Sums


def test_each_sources_loss_is_the_cross_entropy_of_its_own_sequences(make_decoder) -> None:  # type: ignore[no-untyped-def]
    model = make_decoder("llama", kv_heads=2)
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(model.vocab_size, (6, model.context), generator=generator) for _ in range(2))
    weights = (torch.rand(6, model.context, generator=generator) < 0.7).float()
    of = torch.tensor([0, 2, 0, 1, 2, 0])
    batch = {"tokens": tokens, "targets": targets, "weights": weights, "sources": F.one_hot(of, 3).float()}
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    sums = Sums.of(halves, torch.device("cpu"))
    for half in halves:
        sums.add(LossSum(*model(half)), half)
    with torch.no_grad():
        losses = F.cross_entropy(model.logits(batch).flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view_as(weights) * weights
    expected = [losses.sum(), weights.sum()]
    for source in range(3):
        expected += [losses[of == source].sum(), weights[of == source].sum()]
    found = torch.cat([torch.stack([sums.loss, sums.weight]), sums.vector[2:]])
    torch.testing.assert_close(found, torch.stack(expected).double(), rtol=1e-6, atol=0)


def test_a_model_that_does_not_tell_sequences_apart_leaves_the_sources_empty() -> None:
    batch = {"sources": torch.eye(2)}
    sums = Sums.of([batch], torch.device("cpu"))
    sums.add(LossSum(torch.tensor(3.0), torch.tensor(2.0)), batch)
    assert (sums.loss, sums.weight, sums.vector[2:].tolist()) == (3, 2, [0, 0, 0, 0])


def test_a_hugging_face_models_sequences_add_up_to_its_loss() -> None:
    """A stand-in gives the logits: any model of transformers returns an object with them."""
    generator = torch.Generator().manual_seed(3)
    logits, weights = torch.randn(3, 5, 7, generator=generator), torch.rand(3, 5, generator=generator)
    targets = torch.randint(7, (3, 5), generator=generator)
    model = torch.nn.Module()
    model.forward = lambda **_: SimpleNamespace(logits=logits)  # type: ignore[method-assign]
    result = loss_sum(model, Example({}, targets, weights))
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * weights
    assert result.by_sequence is not None
    torch.testing.assert_close(result.by_sequence, torch.stack([losses.sum(1), weights.sum(1)], dim=1))
    torch.testing.assert_close(result.by_sequence.sum(0), torch.stack([result.loss, result.weight]))
