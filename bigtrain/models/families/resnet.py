"""Residual networks with BatchNorm (He et al. 2016), for photographs or small images (section 4.2 of the paper).

Parameters have the names and shapes of torchvision's ResNets. As there, the 3x3 convolution of a bottleneck has the
stride.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES
from bigtrain.models.plain.classifier import ClassifierConfig, Positive


@FAMILIES.register
class Config(ClassifierConfig):
    """ResNet-18 by default; `{block: bottleneck, blocks: [3, 4, 6, 3]}` is ResNet-50."""

    arch: Literal["resnet"] = "resnet"
    blocks: Annotated[tuple[Positive, ...], MinLen(1)] = (2, 2, 2, 2)
    """Number of residual blocks of each stage; all stages except the first halve the image and double the width."""
    block: Literal["basic", "bottleneck"] = "basic"
    """basic: two 3x3 convolutions. bottleneck: 1x1, 3x3 and 1x1, with four times as many channels outside."""
    width: Positive = 64
    """Number of channels of the first stage."""
    stem: Literal["7x7", "3x3"] = "7x7"
    """The first convolution: 7x7 with stride 2 and max pooling for photographs, or 3x3 for small images."""
    stem_stride: Positive = 1
    """Stride of a 3x3 stem."""

    def build(self, vocab_size: int) -> ResNet:
        """The classifier for `vocab_size` classes; convolutions are initialised as in He et al. (2015)."""
        return ResNet(self, vocab_size)


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)


class Basic(nn.Module):
    """relu(x + f(x)), where f has two 3x3 convolutions."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = _convolution(before, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3), nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)
        self.downsample = _shortcut(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x[:, :, :: self.stride, :: self.stride]))


class Bottleneck(nn.Module):
    """relu(x + f(x)), where f has 1x1, 3x3 and 1x1 convolutions."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        after = width * self.expansion
        self.conv1, self.bn1 = _convolution(before, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _convolution(width, after, 1), nn.BatchNorm2d(after)
        nn.init.zeros_(self.bn3.weight)
        self.downsample = _shortcut(before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x[:, :, :: self.stride, :: self.stride]))


def _shortcut(before: int, after: int, stride: int) -> nn.Module:
    """The shortcut of a block: the identity, or a 1x1 convolution if sizes change (option B of the paper).

    The caller passes only every `stride`-th pixel.
    """
    if before == after and stride == 1:
        return nn.Identity()
    # The convolution itself has stride 1: with channels-last inputs, torch 2.13 on a CPU writes out of bounds if a
    # strided 1x1 convolution has few channels.
    return nn.Sequential(_convolution(before, after, 1), nn.BatchNorm2d(after))


BLOCKS: dict[str, type[Basic] | type[Bottleneck]] = {"basic": Basic, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """A stem, stages `layer1`, `layer2`, ... of blocks, the mean over pixels, and a dense layer `fc`.

    The weight of the last BatchNorm of a block is initially zero, so that each block starts as its shortcut (Goyal et
    al. 2017).
    """

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        block = BLOCKS[config.block]
        large = config.stem == "7x7"
        width = config.width
        self.conv1 = _convolution(config.channels, width, 7 if large else 3, 2 if large else config.stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        self.stages = len(config.blocks)
        before = width
        for stage, count in enumerate(config.blocks):
            blocks = nn.ModuleList()
            for number in range(count):
                blocks.append(block(before, width << stage, 2 if stage and not number else 1))
                before = (width << stage) * block.expansion
            setattr(self, f"layer{stage + 1}", blocks)
        self.fc = nn.Linear(before, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, size, size)."""
        # Convolution kernels on CPUs and GPUs compute in the channels-last layout.
        x = self.conv1(images).contiguous(memory_format=torch.channels_last)
        x = self.maxpool(F.relu(self.bn1(x)))
        for stage in range(self.stages):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
