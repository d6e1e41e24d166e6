"""A convolutional generative adversarial network (DCGAN, Radford et al. 2016): two parts, updated alternately.

`optimizer.parts` configures both parts; each step updates the discriminator first. The losses are those of Goodfellow
et al. (2014), for the generator the non-saturating one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, MultipleOf
from torch import Tensor, nn

from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.pictures import Picture, Shown
from bigtrain.models.plain import Batch, PlainConfig, pixels


@FAMILIES.register
class Config(PlainConfig):
    """A network that generates square images from noise vectors."""

    data_kind: ClassVar[DataKind] = "images"
    parts: ClassVar[tuple[str, ...]] = ("discriminator", "generator")
    later_keys: ClassVar[frozenset[str]] = frozenset(["hidden"])

    arch: Literal["dcgan"] = "dcgan"
    image_size: Annotated[int, Gt(0), MultipleOf(4)] = 28
    """Height and width of the images in pixels; a multiple of 4, since both networks halve or double it twice."""
    channels: Annotated[int, Ge(1)] = 1
    """Number of colour channels."""
    width: Annotated[int, Ge(1)] = 32
    """Number of channels of the largest feature maps; the smaller ones have twice as many."""
    latent: Annotated[int, Ge(1)] = 64
    """Length of the noise vector from which an image is generated."""
    hidden: Annotated[int, Ge(0)] = 0
    """Width of a hidden dense layer after the noise, and of one before the score, as in the authors' code for MNIST
    (Newmu/dcgan_code, mnist/train_cond_dcgan.py). If 0, the networks consist of convolutions only, as in the paper."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return (self.image_size, self.image_size, self.channels)

    def build(self, vocab_size: int) -> DCGAN:
        """Both networks, with weights of standard deviation 0.02 as in the paper; `vocab_size` is not used."""
        return DCGAN(self)

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Images (B, channels, S, S) from -1 to 1, the range of the generator's tanh, and the part to update."""
        return 2 * pixels(batch) - 1, batch["part"]

    def loss(self, output: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Losses (B,) of the discriminator, -log D(x) - log(1 - D(G(z))), or of the generator, -log D(G(z))."""
        fooled, *real = output
        return F.softplus(fooled) + F.softplus(-real[0]) if real else F.softplus(-fooled)

    def pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Generated images."""
        noise = torch.randn(shown.count, self.latent, 1, 1, device=shown.batch["images"].device)
        made = (cast(DCGAN, network).generator(noise) + 1) / 2
        return {"samples": Picture(made, note="Generated from random noise, the same at each step.")}


class DCGAN(nn.Module):
    """A generator and a discriminator."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size, width = config.image_size // 4, config.width
        self.latent = config.latent
        self.generator = nn.Sequential(
            *_first_maps(config.latent, config.hidden, 2 * width, size),
            *(nn.BatchNorm2d(2 * width), nn.ReLU()),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            *(nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.ConvTranspose2d(width, config.channels, 4, 2, 1), nn.Tanh()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Conv2d(config.channels, width, 4, 2, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)),
            *_score(2 * width, size, config.hidden),
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor, part: str) -> tuple[Tensor, ...]:
        """Discriminator scores (B,) of generated images, and for the discriminator's update also of real images."""
        noise = torch.randn(len(images), self.latent, 1, 1, device=images.device)
        if part == "generator":
            return (self.discriminator(self.generator(noise)),)
        with torch.no_grad():
            made = self.generator(noise)
        return self.discriminator(made), self.discriminator(images)


def _first_maps(latent: int, hidden: int, maps: int, size: int) -> list[nn.Module]:
    """Modules from noise (B, latent, 1, 1) to feature maps (B, maps, size, size)."""
    if not hidden:
        return [nn.ConvTranspose2d(latent, maps, size, bias=False)]
    return [
        *(nn.Flatten(), nn.Linear(latent, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()),
        *(nn.Linear(hidden, maps * size**2, bias=False), nn.Unflatten(1, (maps, size, size))),
    ]


def _score(maps: int, size: int, hidden: int) -> list[nn.Module]:
    """Modules from feature maps (B, maps, size, size) to scores (B,)."""
    if not hidden:
        return [nn.Conv2d(maps, 1, size), nn.Flatten(0)]
    return [
        *(nn.Flatten(), nn.Linear(maps * size**2, hidden, bias=False), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2)),
        *(nn.Linear(hidden, 1), nn.Flatten(0)),
    ]
