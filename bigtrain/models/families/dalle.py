"""Images from captions (DALL-E, Ramesh et al. 2021): a discrete autoencoder, then a decoder of captions and codes.

With `learns: autoencoder` an image becomes a grid of codes and an image again; codes are drawn by the Gumbel-softmax
relaxation (Jang et al. 2017), whose temperature falls from 1 to 1/16. With `learns: decoder` a causal transformer
learns the tokens of a caption and behind them the codes of its image, by the autoencoder of a run before:

    init: {source: RUN, fresh: ["decoder.*"]}
    optimizer: {frozen: ["autoencoder.*"], ...}
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from pydantic import model_validator
from torch import Tensor, nn

from bigtrain.metrics import record_metric
from bigtrain.models.config import FAMILIES, DataKind
from bigtrain.models.patches import ImageConfig, Positive
from bigtrain.models.pictures import Picture, Shown, one_above_the_other
from bigtrain.models.plain import Batch, LossSum, PlainConfig, pixels
from bigtrain.models.plain.autoencoder import Autoencoder
from bigtrain.models.plain.encoder import encoder_layers
from bigtrain.models.sums import by_sequence

COLDEST = 1 / 16
IMAGE_SHARE = 7 / 8
"""Of the loss that codes have; the rest is the caption's (section 2.2 of the paper)."""


@FAMILIES.register
class Config(PlainConfig, ImageConfig):
    """`patch` pixels square are one code; `context` is the tokens of a caption."""

    data_kind: ClassVar[DataKind] = "captions"
    predicts_text: ClassVar[bool] = False

    arch: Literal["dalle"] = "dalle"
    learns: Literal["autoencoder", "decoder"] = "autoencoder"
    """Which of the two; the decoder takes the codes of an autoencoder that stays as it is."""
    codes: Annotated[int, Ge(2)] = 128
    """How many different codes there are."""
    maps: Positive = 64
    """Channels of the autoencoder."""
    cooling: Positive = 1000
    """Steps in which the temperature falls."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Of the transformer."""

    @model_validator(mode="after")
    def _patch_is_halved(self) -> Config:
        if self.patch < 2 or self.patch & (self.patch - 1):
            raise ValueError(
                f"patch {self.patch} is not a power of two: the autoencoder halves the image until one code for each "
                "patch is left"
            )
        return self

    def build(self, vocab_size: int) -> DallE:
        """Both parts, with torch's own initial values."""
        return DallE(self, vocab_size)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pixels (B, channels, S, S) from -1 to 1, tokens (B, T), which are the caption's (B, T), and the step."""
        return 2 * pixels(batch) - 1, batch["tokens"], batch["weights"] > 0, batch["step"]

    def loss(self, output: tuple[Tensor, ...], batch: Batch) -> LossSum:
        """A sum over pairs: the squared error of pixels, or the cross-entropy of codes and tokens."""
        weights = (batch["weights"] > 0).any(1).float()
        if self.learns == "autoencoder":
            losses = ((output[0] - 2 * pixels(batch) + 1) ** 2).mean((1, 2, 3))
        else:
            of_text, of_codes, codes = output
            image = F.cross_entropy(of_codes.transpose(1, 2), codes, reduction="none").mean(1)
            counted = batch["weights"][:, 1:]
            text = F.cross_entropy(of_text.transpose(1, 2), batch["tokens"][:, 1:], reduction="none") * counted
            record_metric("codes_loss", image, weight=weights, unit="nats")
            losses = IMAGE_SHARE * image + (1 - IMAGE_SHARE) * text.sum(1) / counted.sum(1).clamp(min=1)
        losses = losses.float() * weights
        return LossSum(losses.sum(), weights.sum(), by_sequence(losses, weights))

    def pictures(self, network: nn.Module, shown: Shown) -> dict[str, Picture]:
        """Reconstructions below their images, or images for captions."""
        images, tokens, present, step = self.inputs(shown.batch)
        made = cast(DallE, network)
        if self.learns == "autoencoder":
            return {
                "reconstructions": one_above_the_other(
                    pixels(shown.batch), made(images, tokens, present, step)[0] / 2 + 0.5
                )
            }
        captions = tuple(map(shown.text, tokens.tolist()))
        return {"images for captions": Picture(made.generate(tokens, present) / 2 + 0.5, 4, captions)}


class Decoder(nn.Module):
    """A causal transformer over the tokens of a caption, then codes."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        width, places = config.width, config.context + config.patches - 1
        self.tokens, self.codes = nn.Embedding(vocabulary, width), nn.Embedding(config.codes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(places, width))
        for table in (self.tokens, self.codes):
            nn.init.normal_(table.weight, std=0.02)
        self.layers = encoder_layers(config.layers, width, config.heads, dropout=config.dropout, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.next_token, self.next_code = nn.Linear(width, vocabulary), nn.Linear(width, config.codes)

    def forward(self, tokens: Tensor, present: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of tokens 1 to T - 1, and of codes 0 to n, given tokens (B, T) and n codes (B, n)."""
        x = torch.cat([self.tokens(tokens), self.codes(codes)], 1)
        x = x + self.positions[: x.shape[1]]
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        # A caption without a token has its first place, so that attention has something to look at.
        present = present | (torch.arange(tokens.shape[1], device=x.device) == 0)
        absent = torch.cat([~present, torch.zeros_like(codes, dtype=torch.bool)], 1)
        for layer in self.layers:
            x = layer(x, src_mask=later, src_key_padding_mask=absent)
        x = self.norm(x)
        last = tokens.shape[1] - 1
        return self.next_token(x[:, :last]), self.next_code(x[:, last:])


class DallE(nn.Module):
    """`autoencoder` and `decoder`, of which one learns."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.learns, self.cooling, self.side = config.learns, config.cooling, config.image_size // config.patch
        self.autoencoder, self.decoder = (
            Autoencoder(config.channels, config.maps, config.codes, config.patch),
            Decoder(config, vocabulary),
        )

    def forward(self, images: Tensor, tokens: Tensor, present: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """Images again; or logits of tokens and of codes, and the codes."""
        if self.learns == "decoder":
            codes = self.autoencoder.codes(images)
            return *self.decoder(tokens, present, codes[:, :-1]), codes
        logits = self.autoencoder.encoder(images)
        if not self.training:
            return (self.autoencoder.images(logits.argmax(1).flatten(1), self.side),)
        noise = -(-torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).log()).log()
        temperature = COLDEST ** (step / self.cooling).clamp(max=1)
        return (self.autoencoder.decoder(((logits + noise) / temperature).softmax(1)),)

    @torch.no_grad()
    def generate(self, tokens: Tensor, present: Tensor, temperature: float = 0.7) -> Tensor:
        """An image (B, channels, S, S) from -1 to 1 for each caption (B, T), its codes drawn one after another."""
        codes = tokens.new_zeros(len(tokens), 0)
        for _ in range(self.side**2):
            logits = self.decoder(tokens, present, codes)[1][:, -1]
            codes = torch.cat([codes, (logits / temperature).softmax(1).multinomial(1)], 1)
        return self.autoencoder.images(codes, self.side)
