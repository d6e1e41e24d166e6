"""Contrastive language-image pre-training (CLIP, Radford et al. 2021): images and captions of a batch are matched.

One transformer reads the patches of an image, another the tokens of its caption. The mean of each output becomes a unit
vector. The loss of a pair is the mean of two cross-entropies: its caption among all captions of the global batch, and
its image among all images (figure 3 of the paper). `layout.micro_size` must be large enough that each rank processes
its part of the global batch in one micro-batch.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.patches import ImageConfig
from bigtrain.models.pictures import Picture, Shown
from bigtrain.models.plain import Batch, LossSum, PlainConfig, gather_batch, pixels
from bigtrain.models.plain.encoder import encoder_layers
from bigtrain.models.sums import by_sequence

HIGHEST_SCALE = 100.0
"""Maximum scale of the similarities, as in the paper (section 2.5)."""


@FAMILIES.register
class Config(PlainConfig, ImageConfig):
    """Two transformers of the same width; `context` is the number of tokens of a caption."""

    data_kind: ClassVar[DataKind] = "captions"
    predicts_text: ClassVar[bool] = False
    counted: ClassVar[str] = "pairs"
    loss_unit: ClassVar[str] = "nats per pair"

    arch: Literal["clip"] = "clip"
    text_layers: Annotated[int, Ge(1)] = 2
    """Number of blocks that read the caption; `layers` blocks read the image."""
    embedding: Annotated[int, Ge(1)] = 64
    """Length of the vectors that are compared."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout rate of both transformers."""

    def build(self, vocab_size: int) -> CLIP:
        """Both transformers, initialised mostly by torch's defaults."""
        return CLIP(self, vocab_size)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (B, channels, S, S) from -1 to 1, tokens (B, T), and a boolean (B, T), false for padding."""
        return 2 * pixels(batch) - 1, batch["tokens"], batch["weights"] > 0

    def loss(self, output: tuple[Tensor, Tensor, Tensor], batch: Batch) -> LossSum:
        """Sum of losses over pairs, in nats, and number of pairs; negatives come from the batches of all ranks."""
        images, texts, scale = output
        all_images, first = gather_batch(images)
        all_texts, _ = gather_batch(texts)
        own = first + torch.arange(len(images), device=images.device)
        of_captions = F.cross_entropy(scale * images @ all_texts.T, own, reduction="none")
        of_images = F.cross_entropy(scale * texts @ all_images.T, own, reduction="none")
        weights = (batch["weights"] > 0).any(1).float()
        losses = 0.5 * (of_captions + of_images) * weights
        return LossSum(losses.sum(), weights.sum(), by_sequence(losses, weights))

    def pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Images, with the most similar of all captions shown below each."""
        images, texts, _ = network(*self.inputs(shown.batch))
        tokens = shown.batch["tokens"][(images @ texts.T).argmax(1)]
        captions, note = tuple(map(shown.text, tokens.tolist())), "Below each image, the nearest of all captions shown."
        return {"nearest captions": Picture(pixels(shown.batch), 4, captions, note)}


class CLIP(nn.Module):
    """Two encoders: the similarity of `image_vectors` and `text_vectors` is their dot product."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        width = config.width

        def layers(count: int) -> nn.ModuleList:
            return encoder_layers(count, width, config.heads, dropout=config.dropout, norm_first=True)

        self.patches = nn.Conv2d(config.channels, width, config.patch, config.patch)
        self.image_positions = nn.Parameter(0.02 * torch.randn(config.patches, width))
        self.image_layers = layers(config.layers)
        self.image_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.embedding, bias=False))
        self.tokens = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.text_positions = nn.Parameter(0.01 * torch.randn(config.context, width))
        self.text_layers = layers(config.text_layers)
        self.text_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.embedding, bias=False))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors (B, embedding) of images and of captions, and the scale (a scalar) of their dot products."""
        scale = self.log_scale.clamp(max=math.log(HIGHEST_SCALE)).exp()
        return self.image_vectors(images), self.text_vectors(tokens, present), scale

    def image_vectors(self, images: Tensor) -> Tensor:
        """Unit vectors (B, embedding) of pixels (B, channels, S, S)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.image_positions
        for layer in self.image_layers:
            x = layer(x)
        return F.normalize(self.image_head(x.mean(1)).float(), dim=1)

    def text_vectors(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Unit vectors (B, embedding) of tokens (B, T); those where `present` (B, T) is false are ignored."""
        # In a caption without tokens, the first position counts as present: attention over no keys would give NaN.
        present = present | (torch.arange(tokens.shape[1], device=tokens.device) == 0)
        x = self.tokens(tokens) + self.text_positions[: tokens.shape[1]]
        for layer in self.text_layers:
            x = layer(x, src_key_padding_mask=~present)
        counted = present[..., None].to(x.dtype)
        return F.normalize(self.text_head((x * counted).sum(1) / counted.sum(1)).float(), dim=1)
