"""The file around each network of `authors`: what a user writes beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.models.config import DataKind
from bigtrain.models.plain import Batch, PlainConfig, gather_batch, pixels, sum_over_batch

sys.path.insert(0, str(Path(__file__).parent))
import authors
import further_authors
import more_authors

SIZE = 14


class Digits(PlainConfig):
    """Images of one channel, classified."""

    data_kind: ClassVar[DataKind] = "images"
    arch: Literal["digits"] = "digits"
    network: ClassVar[Any] = None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (SIZE, SIZE, 1)

    def build(self, vocab_size: int) -> nn.Module:
        return self.network(vocab_size)

    def inputs(self, batch: Batch) -> Any:
        return pixels(batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch["labels"], reduction="none")


class Flat(Digits):
    """The same in a row."""

    arch: Literal["flat"] = "flat"

    def build(self, vocab_size: int) -> nn.Module:
        return self.network(SIZE * SIZE, vocab_size)

    def inputs(self, batch: Batch) -> Any:
        return pixels(batch).flatten(1)


class Text(PlainConfig):
    """A language model."""

    arch: Literal["text"] = "text"
    network: ClassVar[Any] = None

    def build(self, vocab_size: int) -> nn.Module:
        return self.network(vocab_size)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output.transpose(1, 2), batch["targets"], reduction="none")


class ResNet(Digits):
    arch: Literal["resnet"] = "resnet"
    network: ClassVar[Any] = authors.ResNet


class LeNet(Digits):
    arch: Literal["lenet"] = "lenet"
    network: ClassVar[Any] = authors.LeNet


class ConvNeXt(Digits):
    arch: Literal["convnext"] = "convnext"
    network: ClassVar[Any] = authors.ConvNeXt


class Diffusion(Digits):
    arch: Literal["ddpm"] = "ddpm"

    def build(self, vocab_size: int) -> nn.Module:
        return authors.Diffusion()

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return output


class UNet(Diffusion):
    arch: Literal["unet"] = "unet"

    def build(self, vocab_size: int) -> nn.Module:
        return authors.UNet()

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return (output - pixels(batch)).square().mean((1, 2, 3))


class VAE(Flat):
    arch: Literal["vae"] = "vae"
    loss_is: ClassVar[Any] = "mean"

    def build(self, vocab_size: int) -> nn.Module:
        return authors.VAE(SIZE * SIZE)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return output["loss"]


class BYOL(Flat):
    arch: Literal["byol"] = "byol"

    def build(self, vocab_size: int) -> nn.Module:
        return authors.BYOL(SIZE * SIZE)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return output


class Discriminator(Flat):
    arch: Literal["discriminator"] = "discriminator"
    network: ClassVar[Any] = authors.Discriminator


class Counting(Flat):
    arch: Literal["counting"] = "counting"
    network: ClassVar[Any] = authors.Counting


class Hooked(Flat):
    arch: Literal["hooked"] = "hooked"
    network: ClassVar[Any] = authors.Hooked


class Skipping(Flat):
    arch: Literal["skipping"] = "skipping"
    network: ClassVar[Any] = authors.Skipping


class NoisyNet(Flat):
    arch: Literal["noisy"] = "noisy"
    network: ClassVar[Any] = authors.NoisyNet


class Fourier(Flat):
    arch: Literal["fourier"] = "fourier"
    network: ClassVar[Any] = authors.Fourier


class Unused(Flat):
    arch: Literal["unused"] = "unused"
    network: ClassVar[Any] = authors.Unused


class Contrastive(Flat):
    arch: Literal["clip"] = "clip"

    def build(self, vocab_size: int) -> nn.Module:
        return authors.CLIP(SIZE * SIZE)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        left, right, scale = output
        own, first = gather_batch(right)
        labels = first + torch.arange(len(left))
        return F.cross_entropy(scale * left @ own.T, labels, reduction="none")


class CharLSTM(Text):
    arch: Literal["lstm"] = "lstm"
    network: ClassVar[Any] = authors.CharLSTM


class PackedGRU(Text):
    arch: Literal["gru"] = "gru"
    network: ClassVar[Any] = authors.PackedGRU


class TiedGPT(Text):
    arch: Literal["tied"] = "tied"

    def build(self, vocab_size: int) -> nn.Module:
        return authors.TiedGPT(vocab_size, self.context)


class Experts(Text):
    arch: Literal["experts"] = "experts"
    network: ClassVar[Any] = authors.Experts


class Forces(PlainConfig):
    data_kind: ClassVar[DataKind] = "arrays"
    arch: Literal["forces"] = "forces"

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        return {"x": (6,), "energy": (), "force": (6,)}

    def build(self, vocab_size: int) -> nn.Module:
        return authors.Forces(6)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        energy, force = output
        return (energy - batch["energy"]).square() + (force - batch["force"]).square().sum(-1)


class Recommender(PlainConfig):
    data_kind: ClassVar[DataKind] = "arrays"
    arch: Literal["recommender"] = "recommender"

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        return {"user": (), "item": (), "rating": ()}

    def build(self, vocab_size: int) -> nn.Module:
        return authors.Recommender(7)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return (output.score - batch["rating"]).square() + output.penalty


class Checkpointed(Flat):
    arch: Literal["checkpointed"] = "checkpointed"
    network: ClassVar[Any] = more_authors.Checkpointed


class DenseNet(Digits):
    arch: Literal["densenet"] = "densenet"
    network: ClassVar[Any] = more_authors.DenseNet


class Capsules(Digits):
    arch: Literal["capsules"] = "capsules"
    network: ClassVar[Any] = more_authors.Capsules

    def loss(self, output: Any, batch: Batch) -> Tensor:
        right = F.one_hot(batch["labels"], output.shape[1]).float()
        return (right * F.relu(0.9 - output) ** 2 + 0.5 * (1 - right) * F.relu(output - 0.1) ** 2).sum(1)


class InstanceNorm(Digits):
    arch: Literal["instance_norm"] = "instance_norm"
    network: ClassVar[Any] = more_authors.InstanceNorm


class Seq2Seq(Text):
    arch: Literal["seq2seq"] = "seq2seq"
    network: ClassVar[Any] = more_authors.Seq2Seq


class Tagger(Text):
    arch: Literal["tagger"] = "tagger"
    network: ClassVar[Any] = more_authors.Tagger


class GraphNet(PlainConfig):
    data_kind: ClassVar[DataKind] = "arrays"
    arch: Literal["graph"] = "graph"

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        return {"nodes": (5, 3), "adjacency": (5, 5), "wanted": ()}

    def build(self, vocab_size: int) -> nn.Module:
        return more_authors.GraphNet()

    def inputs(self, batch: Batch) -> Any:
        return batch["nodes"], batch["adjacency"]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return (output - batch["wanted"]).square()


class FixedGraph(GraphNet):
    arch: Literal["fixed_graph"] = "fixed_graph"

    def build(self, vocab_size: int) -> nn.Module:
        return more_authors.FixedGraph(5)

    def inputs(self, batch: Batch) -> Any:
        return batch["nodes"][..., :2]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return (output.mean(1) - batch["wanted"]).square()


class SharedCodes(more_authors.VQVAE):
    total = staticmethod(sum_over_batch)


class VQVAE(Flat):
    arch: Literal["vqvae"] = "vqvae"

    def build(self, vocab_size: int) -> nn.Module:
        return SharedCodes(SIZE * SIZE)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        made, commitment = output
        return (made - pixels(batch).flatten(1)).square().mean(1) + 0.25 * commitment


class ClippedRNN(Digits):
    arch: Literal["clipped"] = "clipped"

    def build(self, vocab_size: int) -> nn.Module:
        return further_authors.ClippedRNN(SIZE, vocab_size)


class Functional(Flat):
    arch: Literal["functional"] = "functional"
    network: ClassVar[Any] = further_authors.Functional


class SyncNorm(Digits):
    arch: Literal["sync_norm"] = "sync_norm"
    network: ClassVar[Any] = further_authors.SyncNorm


class Equilibrium(Flat):
    arch: Literal["equilibrium"] = "equilibrium"
    network: ClassVar[Any] = further_authors.Equilibrium


class RevNet(Flat):
    arch: Literal["revnet"] = "revnet"
    network: ClassVar[Any] = further_authors.RevNet


class Transcriber(PlainConfig):
    data_kind: ClassVar[DataKind] = "arrays"
    arch: Literal["ctc"] = "ctc"

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        return {"x": (9, 4), "text": (3,)}

    def build(self, vocab_size: int) -> nn.Module:
        return further_authors.Transcriber(4, 5)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        text = 1 + (batch["text"] * 4).long().clamp(0, 3)
        time, count, _ = output.shape
        return F.ctc_loss(output, text, torch.full((count,), time), torch.full((count,), 3), reduction="none")


class RandomFeatures(Flat):
    arch: Literal["random_features"] = "random_features"
    network: ClassVar[Any] = further_authors.RandomFeatures
