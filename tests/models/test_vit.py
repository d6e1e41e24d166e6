"""The image classifier: it learns, counts itself, and cuts images into the right patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.models.config import FAMILIES
from bigtrain.models.families.vit import VisionTransformer
from bigtrain.models.init import initialise
from bigtrain.models.patches import cut

SHAPE = {"image_size": 8, "channels": 3, "patch": 4, "layers": 2, "width": 32, "heads": 4}


def build(classes: int = 3, **keys: Any) -> VisionTransformer:
    model = FAMILIES["vit"](**(SHAPE | keys)).build(classes)
    initialise(model, seed=1)
    assert isinstance(model, VisionTransformer)
    return model


def stripes(count: int) -> dict[str, Tensor]:
    """Images whose label is the channel that is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 128, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), :, :, labels] += 100
    return {"images": images, "labels": labels, "weights": torch.ones(count)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_to_tell_images_apart(dtype: torch.dtype) -> None:
    model, batch = build(), stripes(48)
    model.compute_dtype = dtype
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss, weight, _ = model(batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float((loss / weight).detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_a_filler_of_weight_zero_changes_nothing() -> None:
    model, batch = build(), stripes(6)
    whole = model(batch | {"weights": torch.tensor([1.0] * 5 + [0.0])})
    part = model({name: value[:5] for name, value in batch.items()})
    torch.testing.assert_close(whole.loss, part.loss)
    assert whole.weight == part.weight == 5


def test_patches_hold_neighbouring_pixels() -> None:
    image = torch.arange(8 * 8 * 3, dtype=torch.uint8).reshape(1, 8, 8, 3)
    patches = (cut(image, 4, torch.float32) + 1) * 127.5
    assert patches.shape == (1, 4, 48)
    torch.testing.assert_close(patches[0, 1], image[0, :4, 4:].flatten().float())


def test_parameters_and_flops_are_exact() -> None:
    model = build(classes=7)
    assert model.config.parameter_count(7) == sum(p.numel() for p in model.parameters())
    batch = stripes(2) | {"labels": torch.tensor([0, 6])}
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model(batch)
    assert 3 * counter.get_total_flops() == 2 * model.config.flops_per_token(7).full


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"patch": 3}, "patch 3"), ({"heads": 5}, "heads 5"), ({"context": 9}, "does not take context")],
)
def test_an_impossible_shape_is_refused(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILIES["vit"](**(SHAPE | keys))
