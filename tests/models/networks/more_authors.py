"""More networks as their authors write them: habits of the field that a framework stumbles over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """Blocks with dropout that the author's own forward computes again in the backward pass (Chen et al. 2016)."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Dropout(0.3)) for _ in range(2))
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def _joined(self, *features: Tensor) -> Tensor:
        return self.conv(F.relu(self.norm(torch.cat(features, 1))))

    def forward(self, features: list[Tensor]) -> Tensor:
        return checkpoint(self._joined, *features, use_reentrant=False)


class DenseNet(nn.Module):
    """Batch statistics that are computed again in the backward pass (Huang et al. 2017; Pleiss et al. 2017)."""

    def __init__(self, classes: int, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1, bias=False)
        self.layers = nn.ModuleDict({f"layer{i}": DenseLayer(4 + i * growth, growth) for i in range(2)})
        self.head = nn.Linear(4 + 2 * growth, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers.values():
            features.append(layer(features))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class Capsules(nn.Module):
    """Routing by agreement (Sabour et al. 2017); a `view` of what a convolution gives; a value kept for the log."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 5, 3)
        self.weights = nn.ParameterDict({"route": nn.Parameter(torch.randn(1, 16, classes, 4, 4) * 0.1)})
        self.log: dict[str, Tensor] = {}

    @staticmethod
    def squash(s: Tensor) -> Tensor:
        square = (s**2).sum(-1, keepdim=True)
        return square / (1 + square) * s / (square + 1e-8).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        capsules = self.squash(self.conv(x).view(len(x), -1, 4))
        votes = (self.weights["route"] @ capsules[:, :, None, :, None]).squeeze(-1)
        logits = torch.zeros(*votes.shape[:3], 1)
        for _ in range(2):
            out = self.squash((logits.softmax(2) * votes).sum(1, keepdim=True))
            logits = logits + (votes * out).sum(-1, keepdim=True)
        self.log["norm"] = out.norm().detach()
        return out.squeeze(1).norm(dim=-1)


class InstanceNorm(nn.Module):
    """Running statistics of single images (Ulyanov et al. 2016)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, 2, bias=False)
        self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.head = nn.Linear(4 * 36, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


class Seq2Seq(nn.Module):
    """torch's transformer with time first, as it is without batch_first (Vaswani et al. 2017)."""

    def __init__(self, vocabulary: int, width: int = 8) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(0.1)
        self.transformer = nn.Transformer(width, 2, 1, 1, 16, dropout=0.1)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(tokens))
        x, y = self.dropout(self.source(tokens.flip(0))), self.dropout(self.target(tokens))
        return self.head(self.transformer(x, y, tgt_mask=mask)).transpose(0, 1)


class Tagger(nn.Module):
    """A random state at the beginning, with the layer first and the batch second; packed sequences."""

    def __init__(self, vocabulary: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width // 2, bidirectional=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = 1 + (tokens % 2).sum(1).cpu()
        packed = pack_padded_sequence(self.embedding(tokens).transpose(0, 1), lengths, enforce_sorted=False)
        hidden = torch.randn(2, len(tokens), 4), torch.randn(2, len(tokens), 4)
        out, _ = pad_packed_sequence(self.lstm(packed, hidden)[0], total_length=tokens.shape[1])
        return self.head(out.transpose(0, 1))


class GraphNet(nn.Module):
    """Messages by scatter (Gilmer et al. 2017); batch statistics over nodes, whose number data decides on."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, width)
        self.message = nn.Sequential(nn.Linear(2 * width, width, bias=False), nn.ReLU())
        self.norm, self.head = nn.BatchNorm1d(width), nn.Linear(width, 1)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        count, size, _ = nodes.shape
        there = nodes[..., 0] > 0.3
        number = there.view(-1).long().cumsum(0) - 1
        x = self.encoder(nodes[there])
        graph = torch.arange(count)[:, None].expand(count, size)[there]
        edges = (adjacency > 0.5) & there[:, :, None] & there[:, None, :]
        g, i, j = edges.nonzero(as_tuple=True)
        source, target = number[g * size + i], number[g * size + j]
        messages = self.message(torch.cat([x[source], x[target]], -1))
        x = F.relu(self.norm(x.index_add(0, target, messages)))
        return self.head(torch.zeros(count, x.shape[-1]).index_add(0, graph, x)).squeeze(-1)


class FixedGraph(nn.Module):
    """A sparse matrix in a buffer (Kipf and Welling 2017)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        edges = torch.eye(size) + torch.eye(size).roll(1, 0)
        self.register_buffer("edges", (edges / edges.sum(1, keepdim=True)).to_sparse(), persistent=False)
        self.one, self.two = nn.Linear(2, 8), nn.Linear(8, 1)

    def _spread(self, x: Tensor) -> Tensor:
        return torch.stack([torch.sparse.mm(self.edges, one) for one in x])

    def forward(self, nodes: Tensor) -> Tensor:
        return self.two(self._spread(F.relu(self.one(self._spread(nodes))))).squeeze(-1)


class VQVAE(nn.Module):
    """A codebook that follows the sums of what it codes (van den Oord et al. 2017, appendix)."""

    total = staticmethod(lambda x: x)
    """What sums over the batch; the file around the network says so where ranks share it."""

    def __init__(self, size: int, codes: int = 6, width: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(size, 3 * width), nn.Linear(3 * width, size)
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).view(len(x), 3, -1)
        chosen = torch.cdist(z.flatten(0, 1), self.codes).argmin(1)
        coded = F.embedding(chosen, self.codes).view_as(z)
        if self.training:
            one_hot = F.one_hot(chosen, len(self.codes)).float()
            self.counts.mul_(0.9).add_(self.total(one_hot.sum(0)), alpha=0.1)
            self.sums.mul_(0.9).add_(self.total(one_hot.T @ z.detach().flatten(0, 1)), alpha=0.1)
            self.codes.copy_(self.sums / (self.counts[:, None] + 1e-5))
        return self.decoder((z + (coded - z).detach()).flatten(1)), (coded - z).square().mean((1, 2))
