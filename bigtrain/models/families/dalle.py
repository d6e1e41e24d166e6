"""Images from captions (DALL-E, Ramesh et al. 2021): a discrete autoencoder, and a decoder of captions and codes.

With `learns: autoencoder`, an autoencoder is trained to encode an image as a grid of codes and to reconstruct it. Codes
are sampled by the Gumbel-softmax relaxation (Jang et al. 2017), whose temperature falls from 1 to 1/16. With `learns:
decoder`, a causal transformer is trained on the tokens of a caption, followed by the codes of its image. The codes come
from the autoencoder of an earlier run:

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
"""Weight of the codes in the loss; the rest is the weight of the caption (section 2.2 of the paper)."""


@FAMILIES.register
class Config(PlainConfig, ImageConfig):
    """One code stands for `patch` * `patch` pixels; `context` is the number of tokens of a caption."""

    data_kind: ClassVar[DataKind] = "captions"
    predicts_text: ClassVar[bool] = False
    counted: ClassVar[str] = "pairs"

    arch: Literal["dalle"] = "dalle"
    learns: Literal["autoencoder", "decoder"] = "autoencoder"
    """The part that is trained; the decoder uses the codes of a frozen autoencoder."""
    codes: Annotated[int, Ge(2)] = 128
    """Number of different codes."""
    maps: Positive = 64
    """Number of channels of the autoencoder's hidden layers."""
    cooling: Positive = 1000
    """Number of steps in which the temperature falls to its final value."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout rate of the transformer."""

    @model_validator(mode="after")
    def _patch_is_halved(self) -> Config:
        if self.patch < 2 or self.patch & (self.patch - 1):
            raise ValueError(
                f"patch {self.patch} is not a power of two: the autoencoder halves the image until one code for each "
                "patch is left"
            )
        return self

    def build(self, vocab_size: int) -> DallE:
        """Autoencoder and decoder, initialised mostly by torch's defaults."""
        return DallE(self, vocab_size)

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pixels (B, channels, S, S) from -1 to 1, tokens (B, T), a boolean (B, T), false for padding, and the step."""
        return 2 * pixels(batch) - 1, batch["tokens"], batch["weights"] > 0, batch["step"]

    def loss(self, output: tuple[Tensor, ...], batch: Batch) -> LossSum:
        """Sum over pairs of the squared error of pixels, or of the cross-entropy of codes and tokens in nats."""
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
        """Images above their reconstructions, or images generated from captions."""
        images, tokens, present, step = self.inputs(shown.batch)
        made = cast(DallE, network)
        if self.learns == "autoencoder":
            rebuilt, note = made(images, tokens, present, step)[0] / 2 + 0.5, "Below each image, its reconstruction."
            return {"reconstructions": one_above_the_other(pixels(shown.batch), rebuilt, note=note)}
        captions, note = tuple(map(shown.text, tokens.tolist())), "Generated from the caption below each."
        return {"images for captions": Picture(made.generate(tokens, present) / 2 + 0.5, 4, captions, note)}


class Decoder(nn.Module):
    """A causal transformer over the tokens of a caption, followed by the codes of its image."""

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
        """Logits that predict tokens 1 to T - 1, and codes 0 to n, given tokens (B, T) and codes (B, n).

        Args:
            present: Boolean (B, T), false for padding.
        """
        x = torch.cat([self.tokens(tokens), self.codes(codes)], 1)
        x = x + self.positions[: x.shape[1]]
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        # In a caption without tokens, the first position counts as present: attention over no keys would give NaN.
        present = present | (torch.arange(tokens.shape[1], device=x.device) == 0)
        absent = torch.cat([~present, torch.zeros_like(codes, dtype=torch.bool)], 1)
        for layer in self.layers:
            x = layer(x, src_mask=later, src_key_padding_mask=absent)
        x = self.norm(x)
        last = tokens.shape[1] - 1
        return self.next_token(x[:, :last]), self.next_code(x[:, last:])


class DallE(nn.Module):
    """The modules `autoencoder` and `decoder`, of which one is trained."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.learns, self.cooling, self.side = config.learns, config.cooling, config.image_size // config.patch
        self.autoencoder, self.decoder = (
            Autoencoder(config.channels, config.maps, config.codes, config.patch),
            Decoder(config, vocabulary),
        )

    def forward(self, images: Tensor, tokens: Tensor, present: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        """The reconstructed images; or, for the decoder, logits of tokens, logits of codes, and the codes."""
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
    def generate(self, tokens: Tensor, present: Tensor, temperature: float = 0.3) -> Tensor:
        """Sample the codes of an image for each caption (B, T), one by one, and decode them.

        Args:
            present: Boolean (B, T), false for padding.
            temperature: Divides the logits of the codes; below 1, probable codes become more probable.

        Returns:
            Pixels (B, channels, S, S), about -1 to 1.
        """
        codes = tokens.new_zeros(len(tokens), 0)
        for _ in range(self.side**2):
            logits = self.decoder(tokens, present, codes)[1][:, -1]
            codes = torch.cat([codes, (logits / temperature).softmax(1).multinomial(1)], 1)
        return self.autoencoder.images(codes, self.side)
