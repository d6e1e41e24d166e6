"""ResNet has torchvision's parameters: their names, and the published counts of ResNet-18 and ResNet-50."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.models.families.resnet import Config

CLASSES = 1000


@pytest.mark.parametrize(
    ("shape", "count", "some"),
    [
        ({}, 11_689_512, {"layer2.0.downsample.0.weight": (128, 64, 1, 1), "layer1.1.bn2.running_var": (64,)}),
        (
            {"block": "bottleneck", "blocks": [3, 4, 6, 3]}, 25_557_032,
            {"layer1.0.downsample.1.weight": (256,), "layer4.2.conv3.weight": (2048, 512, 1, 1)},
        ),
    ],
    ids=["resnet18", "resnet50"],
)  # fmt: skip
def test_it_has_the_parameters_of_torchvision(shape: dict[str, Any], count: int, some: dict[str, tuple]) -> None:
    with torch.device("meta"):
        network = Config.model_validate({"image_size": 224, **shape}).build(CLASSES)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state | some | {"conv1.weight": (64, 3, 7, 7), "fc.bias": (CLASSES,)} == state
