"""Prompts lie where they should, and the model's numbers are those of the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bigtrain.metrics import Recorder
from bigtrain.models.families.sam import Config
from bigtrain.models.pictures import Shown
from bigtrain.models.prompts import at, box_around, point_in
from tests.scenes import scenes

SIZES: dict[str, Any] = {"image_size": 48, "channels": 1, "layers": 1, "width": 8, "heads": 2, "masks": 2}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Six scenes; the mask of the last one is empty."""
    digits = np.zeros((1, 28, 28), np.uint8)
    digits[:, 4:24, 10:18] = 255
    images, masks = scenes(digits, 6)
    masks[5] = 0
    return {"image": torch.from_numpy(images), "mask": torch.from_numpy(masks), "weights": torch.ones(6)}


def test_a_point_is_drawn_from_the_mask_and_anywhere_where_that_is_empty(batch: dict[str, torch.Tensor]) -> None:
    mask = batch["mask"] > 0
    drawn = [at(point_in(mask), mask) for _ in range(30)]
    assert all(one.sum((1, 2)).eq(1).all() for one in drawn)
    assert all((one & ~mask)[:5].sum() == 0 for one in drawn)
    assert all(sum(one[row].float() for one in drawn).gt(0).sum() > 10 for row in range(6)), "always the same pixels"


def test_a_box_is_the_smallest_around_the_mask(batch: dict[str, torch.Tensor]) -> None:
    first, last = box_around(batch["mask"] > 0)
    for row, mask in enumerate(batch["mask"][:5].numpy()):
        rows, columns = np.nonzero(mask)
        assert (48 * first[row]).tolist() == [rows.min(), columns.min()]
        assert (48 * last[row]).tolist() == [rows.max() + 1, columns.max() + 1]
    assert (first[5].tolist(), last[5].tolist()) == ([0, 0], [1, 1])


def test_the_iou_is_that_of_the_mask_with_the_best_guess_and_the_best_mask_is_trained(
    batch: dict[str, torch.Tensor],
) -> None:
    mask = batch["mask"] > 0
    right, empty = 40.0 * mask - 20.0, torch.full(mask.shape, -20.0)
    guesses = torch.tensor([[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 4)
    output = torch.stack([right, empty], 1), guesses, torch.zeros(6, 2, 2)
    with Recorder(torch.device("cpu")).active() as recorder:
        losses = Config(**SIZES).loss(output, batch)
    # Nothing was found in samples 2 to 4; of an empty mask nothing is right.
    total, weight = recorder.get("iou").tolist()
    assert total / weight == pytest.approx(3 / 6, abs=1e-6)
    true = torch.tensor([[1.0, 0.0]] * 5 + [[1.0, 1.0]])
    torch.testing.assert_close(losses, ((guesses - true) ** 2).mean(1), atol=1e-4, rtol=0)


def test_evaluations_prompt_by_points_and_pictures_show_them(batch: dict[str, torch.Tensor]) -> None:
    config = Config(**SIZES, boxes=1.0)
    network = config.build(0)
    training, evaluation = (network.train(mode)(*config.inputs(batch))[2] for mode in (True, False))
    assert (training[:, 0] != training[:, 1]).any(1).all()
    assert torch.equal(evaluation[:, 0], evaluation[:, 1])
    pictures = config.pictures(network.eval(), Shown(batch, lambda tokens: ""))
    assert pictures["masks"].images.shape == (16, 3, 48, 48), "two rows of eight, of which six are filled"


@pytest.mark.parametrize("sizes", [{"patch": 3}, {"patch": 16}, {"width": 6, "patch": 2}])
def test_sizes_that_do_not_grow_to_pixels_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="power of two that divides width"):
        Config(**{**SIZES, **sizes})
