"""A variational autoencoder (Kingma and Welling 2014), or with `variational: false` a plain autoencoder.

An encoder returns the mean and the log variance of an image's code. A decoder returns the probability that a pixel is
white. The loss is the negative bound of the paper's eq. 10 with one sample, in nats per image: the cross-entropy of the
pixels, plus the divergence of the code from a standard normal (appendix B). A plain autoencoder (Hinton and
Salakhutdinov 2006) decodes the mean, and its loss is only the cross-entropy.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from bigtrain.metrics import record_metric
from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.pictures import Picture, Shown, one_above_the_other
from bigtrain.models.plain import Batch, PlainConfig, pixels


@FAMILIES.register
class Config(PlainConfig):
    """An encoder and a decoder of square images, each with one hidden layer."""

    data_kind: ClassVar[DataKind] = "images"
    loss_unit: ClassVar[str] = "nats per image"

    arch: Literal["vae"] = "vae"
    image_size: Annotated[int, Ge(1)] = 28
    """Height and width of the images in pixels."""
    channels: Annotated[int, Ge(1)] = 1
    """Number of colour channels."""
    width: Annotated[int, Ge(1)] = 400
    """Number of units of the hidden layers."""
    latent: Annotated[int, Ge(1)] = 20
    """Length of the code."""
    variational: bool = True
    """Whether the code is sampled from a normal distribution; false: a plain autoencoder."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (self.image_size, self.image_size, self.channels)

    def build(self, vocab_size: int) -> VAE:
        """Encoder and decoder; `vocab_size` is not used."""
        return VAE(self.image_size**2 * self.channels, self.width, self.latent, self.variational)

    def inputs(self, batch: Batch) -> Tensor:
        """Pixels (B, P), all channels together, from 0 to 1."""
        return pixels(batch).flatten(1)

    def loss(self, output: tuple[Tensor, Tensor, Tensor], batch: Batch) -> Tensor:
        """The loss (B,), in nats; a variational autoencoder also records its divergence."""
        logits, mean, log_variance = output
        cross_entropy = F.binary_cross_entropy_with_logits(logits, self.inputs(batch), reduction="none").sum(1)
        if not self.variational:
            return cross_entropy
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
        record_metric("divergence", divergence, weight=batch["weights"], unit="nats")
        return cross_entropy + divergence

    def pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Images above their reconstructions; and, if variational, images decoded from random codes."""
        images = pixels(shown.batch)
        logits, _, _ = network(self.inputs(shown.batch))
        note = "Below each image, its reconstruction."
        found = {"reconstructions": one_above_the_other(images, logits.sigmoid().view_as(images), note=note)}
        if self.variational:
            codes = torch.randn(shown.count, self.latent, device=images.device)
            made = cast(VAE, network).decoder(codes).sigmoid().view_as(images)
            found["samples"] = Picture(made, note="Decoded from random codes, the same at each step.")
        return found


class VAE(nn.Module):
    """An encoder and a decoder."""

    def __init__(self, pixels: int, width: int, latent: int, variational: bool) -> None:
        super().__init__()
        self.latent, self.variational = latent, variational
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU())
        self.mean = nn.Linear(width, latent)
        self.log_variance = nn.Linear(width, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the pixels (B, P), and mean and log variance of the codes, each (B, latent)."""
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean
        if self.variational:
            code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance
