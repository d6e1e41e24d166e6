"""The captioner: it learns, counts itself, and sees what it may see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.models.config import FAMILIES
from bigtrain.models.families.captioner import Captioner
from bigtrain.models.init import initialise
from bigtrain.models.sampling import Choice, generate

SHAPE = {"image_size": 8, "channels": 3, "patch": 4, "layers": 2, "width": 32, "heads": 4, "context": 6}


def build(vocabulary: int = 11, **keys: Any) -> Captioner:
    model = FAMILIES["captioner"](**(SHAPE | keys)).build(vocabulary)
    initialise(model, seed=1)
    assert isinstance(model, Captioner)
    return model


def named_colours(count: int) -> dict[str, Tensor]:
    """Images whose caption is a word for the bright channel: (c, c + 1, ..., end), of a length that differs."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.arange(count) % 3
    images = torch.randint(0, 128, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), :, :, colours] += 100
    places = torch.arange(6)
    lengths = 2 + colours[:, None]
    tokens = torch.where(places < lengths, colours[:, None] + places, torch.where(places == lengths, 10, 0))
    return {"images": images, "tokens": tokens, "weights": (places <= lengths).float()}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_it_learns_to_caption_and_writes_what_it_has_learned(dtype: torch.dtype) -> None:
    model, batch = build(), named_colours(24)
    model.compute_dtype = dtype
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, weight, _ = model(batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float((loss / weight).detach()))
    assert losses[-1] < 0.1 * losses[0]
    nothing = torch.zeros((3, 0), dtype=torch.int64)
    written = generate(model, nothing, 6, Choice(0), given={"images": batch["images"][:3]})
    kept = batch["weights"][:3] > 0
    assert torch.equal(written[kept], batch["tokens"][:3][kept])


def test_a_filler_and_padding_change_nothing() -> None:
    model, batch = build(), named_colours(6)
    part = model({name: value[:5] for name, value in batch.items()})
    batch["weights"][5] = 0
    batch["tokens"] = torch.where(batch["weights"] > 0, batch["tokens"], 7)
    whole = model(batch)
    torch.testing.assert_close(whole.loss, part.loss)
    assert whole.weight == part.weight == batch["weights"].sum()


def test_a_token_sees_all_patches_and_nothing_after_it() -> None:
    model, batch = build(), named_colours(2)
    logits = model.logits({"images": batch["images"], "tokens": batch["tokens"][:, :5]})
    assert logits.shape == (2, 6, 11)
    later = batch["tokens"][:, :5].clone()
    later[:, 3] = 9
    changed = model.logits({"images": batch["images"], "tokens": later})
    assert torch.equal(changed[:, :4], logits[:, :4])
    assert not torch.equal(changed[:, 4:], logits[:, 4:])
    # The last patch and the first are as near to the first token.
    for corner in (0, 7):
        images = batch["images"].clone()
        images[:, corner, corner] = 255
        assert not torch.equal(model.logits({"images": images, "tokens": later})[:, 0], logits[:, 0])


def test_its_loss_is_the_cross_entropy_of_its_logits() -> None:
    model, batch = build(), named_colours(4)
    logits = model.logits({"images": batch["images"], "tokens": batch["tokens"][:, :-1]})
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none")
    torch.testing.assert_close(model(batch).loss, (losses * batch["weights"]).sum())


def test_parameters_and_flops_are_exact() -> None:
    model = build(vocabulary=19)
    config = model.config
    assert config.parameter_count(19) == sum(p.numel() for p in model.parameters())
    tables = model.embedding.weight.numel() + model.position_embedding.weight.numel()
    assert config.parameter_count(19) - config.parameter_count_without_embeddings(19) == tables
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(named_colours(2))
    assert 3 * counter.get_total_flops() // (2 * config.context) == config.flops_per_token(19).full
    assert config.flops_per_token(19).causal < config.flops_per_token(19).full


@pytest.mark.parametrize(("keys", "message"), [({"patch": 3}, "patch 3"), ({"heads": 5}, "heads 5")])
def test_an_impossible_shape_is_refused(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILIES["captioner"](**(SHAPE | keys))
    with pytest.raises(ValueError, match="'context'"):
        FAMILIES["captioner"](**{name: size for name, size in SHAPE.items() if name != "context"})
