"""Segmentation of the object that a point or a box indicates (Segment Anything, Kirillov et al. 2023).

A transformer reads the patches of an image. A decoder with two-way attention (figure 14 of the paper) reads its output
and the prompt. It returns several masks, because a point may mean an object or a part of it, and an estimate of the
IoU of each mask. The prompt is sampled for each sample: a point inside its mask, or the bounding box of the mask. If
the mask is empty, the point is anywhere in the image.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from pydantic import model_validator
from torch import Tensor, nn

from bigtrain.metrics import record_metric
from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.patches import ImageConfig, Positive
from bigtrain.models.pictures import Picture, Shown, one_above_the_other
from bigtrain.models.plain import Batch, PlainConfig
from bigtrain.models.plain.encoder import TwoWayBlock, encoder_layers
from bigtrain.models.prompts import at, box_around, point_in

FOCAL_WEIGHT, FOCUS = 20.0, 2.0
"""Weight of the focal loss relative to the dice loss (section 3), and exponent of the focal loss (Lin et al. 2017)."""
POINT, NO_POINT, FIRST_CORNER, LAST_CORNER = range(4)


@FAMILIES.register
class Config(PlainConfig, ImageConfig):
    """Samples are arrays `image` (S, S, channels) and `mask` (S, S), which is nonzero inside one object."""

    data_kind: ClassVar[DataKind] = "arrays"
    counted: ClassVar[str] = "images"

    arch: Literal["sam"] = "sam"
    decoder_layers: Positive = 2
    """Number of blocks of two-way attention."""
    masks: Positive = 3
    """Number of masks per prompt. The mask with the lowest loss is trained (section 3); the result is the mask with the
    highest estimated IoU."""
    boxes: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of training samples whose prompt is a box; in evaluations it is always a point."""

    @model_validator(mode="after")
    def _masks_grow_to_the_image(self) -> Config:
        if self.patch & (self.patch - 1) or self.width % self.patch or self.width % 4:
            raise ValueError(
                f"the decoder doubles a patch's side and halves the width up to single pixels: patch {self.patch} must "
                f"be a power of two that divides width {self.width}, which 4 divides too"
            )
        return self

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        """See `ModelConfig.sample_arrays`: an image and its mask."""
        return {"image": (self.image_size, self.image_size, self.channels), "mask": (self.image_size, self.image_size)}

    def build(self, vocab_size: int) -> SAM:
        """Encoder and decoder; `vocab_size` is not used."""
        return SAM(self)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pixels (B, channels, S, S), where uint8 values are scaled to [-1, 1], and boolean masks (B, S, S)."""
        image = batch["image"]
        image = image.float() if image.is_floating_point() else image.float() / 127.5 - 1
        return image.permute(0, 3, 1, 2), batch["mask"] != 0

    def loss(self, output: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Tensor:
        """Losses (B,): focal and dice loss of the best mask, plus squared error of the IoU estimates. Records `iou`."""
        logits, guesses, _ = output
        mask = (batch["mask"] != 0).float()[:, None].expand_as(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        focal = (entropy * (1 - (-entropy).exp()) ** FOCUS).mean((2, 3))
        shares = logits.sigmoid()
        dice = 1 - (2 * (shares * mask).sum((2, 3)) + 1) / (shares.sum((2, 3)) + mask.sum((2, 3)) + 1)
        found, true = logits > 0, mask > 0
        iou = ((found & true).sum((2, 3)) + 1e-6) / ((found | true).sum((2, 3)) + 1e-6)
        chosen = iou.gather(1, guesses.argmax(1, keepdim=True))[:, 0]
        record_metric("iou", chosen, weight=batch["weights"])
        return (FOCAL_WEIGHT * focal + dice).amin(1) + ((guesses - iou) ** 2).mean(1)

    def pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Images with the true mask in red; below each, the predicted mask, with the prompt's point in green."""
        image, mask = self.inputs(shown.batch)
        logits, guesses, prompt = network(image, mask)
        found = logits[torch.arange(len(logits)), guesses.argmax(1)] > 0
        plain = (image.mean(1, keepdim=True) / 2 + 0.5).expand(-1, 3, -1, -1)
        red, green = (plain.new_tensor(colour)[:, None, None] for colour in ((1.0, 0.2, 0.2), (0.0, 1.0, 0.0)))
        true, made = (torch.where(one[:, None], 0.5 * plain + 0.5 * red, plain) for one in (mask, found))
        pointed = torch.where(at(prompt[:, 0], mask)[:, None], green, made)
        note = "In red, the true mask, and below it the predicted one; in green, the point that prompts it."
        return {"masks": one_above_the_other(true, pointed, note=note)}


class SAM(nn.Module):
    """An encoder and a decoder; the encoder reads only the image, so several prompts can share its output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, side = config.width, config.image_size // config.patch
        self.boxes = config.boxes
        self.patches = nn.Conv2d(config.channels, width, config.patch, config.patch)
        self.positions = nn.Parameter(0.02 * torch.randn(side**2, width))
        self.encoder = encoder_layers(config.layers, width, config.heads, dropout=0.0, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("frequencies", torch.randn(2, width // 2))
        self.kinds = nn.Embedding(4, width)
        self.outputs = nn.Parameter(torch.randn(1 + config.masks, width))
        self.decoder = nn.ModuleList(TwoWayBlock(width, config.heads) for _ in range(config.decoder_layers))
        doublings = int(math.log2(config.patch))
        self.grow = nn.Sequential(
            *(
                nn.Sequential(nn.ConvTranspose2d(width >> step, width >> (step + 1), 2, 2), nn.GELU())
                for step in range(doublings)
            )
        )
        self.weights_of = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width >> doublings))
            for _ in range(config.masks)
        )
        self.quality = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.masks))

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of M masks (B, M, S, S), estimates of their IoU (B, M), and the prompts (B, 2, 2).

        A prompt is a point, repeated, or two corners of a box.
        """
        box = torch.rand(len(mask), 1, 1, device=mask.device) < self.boxes * self.training
        point = point_in(mask)[:, None].expand(-1, 2, -1)
        where = torch.where(box, torch.stack(box_around(mask), 1), point)
        logits, quality = self.decode(self.encode(image), where, box)
        return logits, quality, where

    def encode(self, image: Tensor) -> Tensor:
        """Encoded patches (B, T, W) of pixels (B, channels, S, S)."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        for layer in self.encoder:
            x = layer(x)
        encoded: Tensor = self.norm(x)
        return encoded

    def decode(self, image: Tensor, where: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of masks (B, M, S, S), and estimates of their IoU (B, M).

        Args:
            image: Encoded patches (B, T, W).
            where: Prompts (B, 2, 2), see `forward`.
            box: Boolean (B, 1, 1), whether a prompt is a box.
        """
        kinds = self.kinds.weight
        corners = self.place(where) + kinds[FIRST_CORNER:]
        points = torch.cat([self.place(where[:, :1]) + kinds[POINT], kinds[NO_POINT].expand(len(where), 1, -1)], 1)
        prompt = torch.cat([self.outputs.expand(len(where), -1, -1), torch.where(box, corners, points)], 1)
        side = math.isqrt(image.shape[1])
        centre = (torch.arange(side, device=image.device) + 0.5) / side
        places = self.place(torch.cartesian_prod(centre, centre))
        tokens = prompt
        for block in self.decoder:
            tokens, image = block(tokens, image, prompt, places)
        grown = self.grow(image.transpose(1, 2).unflatten(2, (side, side)))
        weights = torch.stack([layer(tokens[:, 1 + number]) for number, layer in enumerate(self.weights_of)], 1)
        return torch.einsum("bmc,bchw->bmhw", weights, grown).float(), self.quality(tokens[:, 0]).float()

    def place(self, where: Tensor) -> Tensor:
        """Fourier features (..., W) of relative coordinates (..., 2) from 0 to 1 (Tancik et al. 2020)."""
        frequencies = cast(Tensor, self.frequencies)
        angles = 2 * math.pi * (2 * where - 1).to(frequencies.dtype) @ frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)
