"""The networks of configs/, each trained on real data until its figure: `python -m tests.bench.networks [NAME ...]`.

The data come from BIGTRAIN_TEST_DATA (shared/data beside the checkout). Each network is trained by `bigtrain train`
with the YAML of configs/, and its figure is read from the run. The table goes to tests/bench/results/networks.txt; the
rows of networks that are not named stay as they are there. What some show goes to networks.png, once all of SHOWN are
trained. A network is one record of NETWORKS.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import bigtrain
from bigtrain.data.index import load_index
from bigtrain.data.loader import EvaluationLoader
from tests.bench.network_data import (
    PASSAGES,
    ROOT,
    addition,
    authors,
    command,
    emoji,
    halves,
    mnist,
    novels,
    shakespeare,
    things,
)  # fmt: skip

RESULTS = ROOT / "tests" / "bench" / "results" / "networks.txt"
HEADER = ("network", "data", "must reach", "reached", "", "seconds", "CPU s", "load")
SHOWN = (
    ("digits by DCGAN", "dcgan", "samples"),
    ("SAM: masks, and below them found from a point", "sam", "masks"),
    ("DALL-E: emoji for held-out names", "dall-e", "images-for-captions"),
)
"""Title, run and picture of the panels of networks.png."""
FROM_SEED = "init={source: null, fresh: []}"
PANEL, GAP, TITLE = (360, 250), 12, 22


# Figures.


@dataclass(frozen=True)
class Reached:
    """What a run has reached."""

    text: str
    is_enough: bool


Figure = Callable[[Path, str], Reached]
"""From the directory of all runs, and the name of one."""


def last(runs: Path, name: str, metric: str) -> float:
    """A metric of a run's last evaluation."""
    values = [row[metric] for row in bigtrain.Run(name, runs).metrics() if row.get(metric) is not None]
    return float(values[-1])


def at_least(metric: str, wanted: float) -> Figure:
    """A share that must be reached."""

    def figure(runs: Path, name: str) -> Reached:
        value = last(runs, name, metric)
        return Reached(f"{value:.2%}", value >= wanted)

    return figure


def at_most(metric: str, wanted: float, form: str) -> Figure:
    """A loss that must be reached."""

    def figure(runs: Path, name: str) -> Reached:
        value = last(runs, name, metric)
        return Reached(f"{value:{form}}", value <= wanted)

    return figure


def above(other: str) -> Figure:
    """A loss that another network must be below."""

    def figure(runs: Path, name: str) -> Reached:
        value = last(runs, name, "val_loss")
        return Reached(f"{value:.3f}", value > last(runs, other, "val_loss"))

    return figure


def better_than(other: str, metric: str, count: int) -> Figure:
    """A share that is higher than another network's by more than two standard errors of the difference.

    Args:
        count: Number of held-out samples.
    """

    def figure(runs: Path, name: str) -> Reached:
        value, before = last(runs, name, metric), last(runs, other, metric)
        error = math.sqrt((value * (1 - value) + before * (1 - before)) / count)
        return Reached(f"{value:.1%} ({before:.1%})", value > before + 2 * error)

    return figure


def recognised(classifier: str, wanted: float, count: int = 2000) -> Figure:
    """The classes and the mean confidence that a classifier of real digits gives to generated ones."""

    def figure(runs: Path, name: str) -> Reached:
        generator, judge = (bigtrain.load(one, runs_dir=runs) for one in (name, classifier))
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            made = generator.generator(torch.randn(count, generator.latent, 1, 1))
            images = (127.5 * (made + 1)).round().to(torch.uint8).permute(0, 2, 3, 1)
            shares = judge.logits({"images": images}).softmax(1)
        confidence, classes = shares.max(1)
        found = len(classes.unique())
        return Reached(f"{found} classes, {confidence.mean():.3f}", found == 10 and bool(confidence.mean() >= wanted))

    return figure


def below_counts(runs: Path, name: str) -> Reached:
    """A masked loss, beside what the frequencies of single bytes and of pairs in the training data give."""
    data = bigtrain.Run(name, runs).config().data
    train, held_out = (
        _tokens(runs.parent / place) for key in ("train", "validation") for place in data.places(key).values()
    )
    one, two = np.ones(257), np.ones((257, 257))
    np.add.at(one, train, 1)
    np.add.at(two, (train[:-1], train[1:]), 1)
    unigram = -np.log(one / one.sum())[held_out].mean()
    bigram = -np.log(two / two.sum(1, keepdims=True))[held_out[:-1], held_out[1:]].mean()
    value = last(runs, name, "val_loss")
    return Reached(f"{value:.3f} (unigram {unigram:.3f}, bigram {bigram:.3f})", value < min(unigram, bigram))


def _tokens(place: Path) -> np.ndarray:
    """All tokens of a shard directory."""
    context = 64
    index = load_index(place)
    with EvaluationLoader(index, batches=10**6, batch_size=4096, context=context) as loader:
        parts = [batch.micro_batches[0] for batch in loader]
    return np.concatenate([part["tokens"][part["weights"].any(1)].ravel() for part in parts])


def recall(times_chance: float, among: int = 10) -> Figure:
    """How often the own caption is among the nearest of all held-out ones, beside how often it would be by chance."""

    def figure(runs: Path, name: str) -> Reached:
        model, config = bigtrain.load(name, runs_dir=runs), bigtrain.Run(name, runs).config()
        batch = {key: torch.from_numpy(values) for key, values in _held_out(runs, config).items()}
        with torch.no_grad():
            images, texts, _ = model(*config.model.inputs(batch))
        similar = images @ texts.T
        better = (similar > similar.diag()[:, None]).sum(1)
        found, chance = float((better < among).float().mean()), among / len(images)
        return Reached(f"{found:.1%}, chance {chance:.2%}", found >= times_chance * chance)

    return figure


def below_mean_colours(runs: Path, name: str) -> Reached:
    """The squared error of reconstructions from codes, beside that of the exact mean colour of each patch."""
    config = bigtrain.Run(name, runs).config()
    arrays = _held_out(runs, config)
    side = config.model.patch
    images = arrays["images"] / 127.5 - 1
    patches = images.reshape(len(images), images.shape[1] // side, side, images.shape[2] // side, side, -1)
    means = float(((patches - patches.mean((2, 4), keepdims=True)) ** 2).mean())
    value = last(runs, name, "val_loss")
    return Reached(f"{value:.3f} (mean colours {means:.3f})", value < means)


def _held_out(runs: Path, config: Any) -> dict[str, np.ndarray]:
    """The arrays of all held-out pairs of an image and its caption."""
    (place,) = (str(runs.parent / one) for one in config.data.places("validation").values())
    with EvaluationLoader(place, batches=1, batch_size=10_000, context=config.model.context) as loader:
        arrays = next(iter(loader)).micro_batches[0]
    return {name: values[arrays["weights"].any(1)] for name, values in arrays.items()}


def ranked_by(judge: str, wanted: float) -> Figure:
    """How often an image made for a held-out caption suits it better, to a judge, than one made for another."""

    def figure(runs: Path, name: str) -> Reached:
        model, clip, config = (bigtrain.load(name, runs_dir=runs), bigtrain.load(judge, runs_dir=runs),
                               bigtrain.Run(name, runs).config())  # fmt: skip
        arrays = _held_out(runs, config)
        tokens, present = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["weights"]) > 0
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            images = model.generate(tokens, present).clamp(-1, 1)
            scores = clip.text_vectors(tokens, present) @ clip.image_vectors(images).T
        beaten = (scores < scores.diag()[:, None]).float().sum() / (len(scores) * (len(scores) - 1))
        return Reached(f"{beaten:.1%}", bool(beaten >= wanted))

    return figure


# Networks.


@dataclass(frozen=True)
class Network:
    """A row of the table."""

    name: str
    config: str
    """The file of configs/, without its suffix."""
    data: Callable[[Path], None]
    """Writes the shards that the file names; its name stands in the table."""
    must_reach: str
    figure: Figure
    overrides: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    """Networks whose runs this one or its figure needs."""

    @property
    def run(self) -> str:
        """The name of its run."""
        return self.name.lower().replace(" ", "-")


NETWORKS = (
    Network("LeNet", "lenet-mnist", mnist, "99.25 % accuracy", at_least("val_accuracy", 0.9925)),
    Network("ResNet", "resnet-mnist", mnist, "99.4 % accuracy", at_least("val_accuracy", 0.994)),
    Network("ViT", "vit-mnist", mnist, "98.5 % accuracy", at_least("val_accuracy", 0.985)),
    Network(
        "DCGAN", "dcgan-mnist", mnist, "10 classes, confidence 0.9", recognised("vit", 0.9), after=("ViT",)
    ),
    Network("VAE", "vae-mnist", mnist, "106 nats", at_most("val_loss", 106, ".1f")),
    Network("LSTM", "rnn-shakespeare", shakespeare, "loss 1.75", at_most("val_loss", 1.75, ".3f")),
    Network("GRU", "rnn-shakespeare", shakespeare, "loss 1.75", at_most("val_loss", 1.75, ".3f"), ("model.cell=gru",)),
    Network(
        "RNN", "rnn-shakespeare", shakespeare, "above the LSTM's", above("lstm"), ("model.cell=rnn",), after=("LSTM",)
    ),
    Network("LSTM seq2seq", "seq2seq-addition", addition, "99 % of answers", at_least("val_answers", 0.99)),
    Network("BERT", "bert-novels", novels, "below unigram and bigram", below_counts),
    Network(
        "BERT from scratch", "bert-authors", authors, "above one in six", at_least("val_accuracy", 0.2), (FROM_SEED,)
    ),
    Network(
        "BERT authors", "bert-authors", authors, "above from scratch, 2 errors",
        better_than("bert-from-scratch", "val_accuracy", PASSAGES), ("init.source=bert",),
        after=("BERT", "BERT from scratch"),
    ),
    Network("CLIP", "clip-emoji", emoji, "recall at 10: 10 x chance", recall(10)),
    Network(
        "DALL-E codes", "dalle-emoji", emoji, "below mean colours", below_mean_colours,
        ("model.learns=autoencoder", FROM_SEED, "optimizer.frozen=[decoder.*]", "duration=60 epochs"),
    ),
    Network(
        "DALL-E", "dalle-emoji", emoji, "CLIP's choice of two: 75 %", ranked_by("clip", 0.75),
        ("init.source=dall-e-codes",), after=("CLIP", "DALL-E codes"),
    ),
    Network("SAM", "sam-scenes", things, "IoU 0.9 from a point", at_least("val_iou", 0.9)),
    Network(
        "LeNet 0 to 4", "lenet-mnist", halves, "99 % accuracy", at_least("val_accuracy", 0.99),
        ("duration=5 epochs", "data.train=shards/mnist-0-to-4/train", "data.validation=shards/mnist-0-to-4/validation"),
    ),
    Network(
        "transfer to 5 to 9", "transfer-mnist", halves, "99.2 % accuracy", at_least("val_accuracy", 0.992),
        after=("LeNet 0 to 4",),
    ),
)  # fmt: skip


def main() -> int:
    """Train what is named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="networks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(one.run for one in NETWORKS)}")
    parser.add_argument("--work", type=Path, help="where shards and runs go; those that are there are used again")
    options = parser.parse_args()
    unknown = {*options.names} - {one.run for one in NETWORKS}
    if unknown:
        parser.error(f"no such network: {', '.join(sorted(unknown))}")
    chosen = [one for one in NETWORKS if not options.names or one.run in options.names]
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        rows = {one.name: measure(one, work) for one in chosen}
        collage(work)
    table = written(known_rows() | rows)
    RESULTS.write_text(table)
    print(table, end="")
    return int(any(row[4] != "yes" for row in rows.values()))


def measure(network: Network, work: Path) -> tuple[str, ...]:
    """Train one network, and read its figure."""
    train(network, work)
    reached = network.figure(work / "runs", network.run)
    timing = json.loads((work / "runs" / f"{network.run}.json").read_text())
    return (
        network.name, network.data.__name__, network.must_reach, reached.text, "yes" if reached.is_enough else "no",
        *(f"{timing[key]:.0f}" for key in ("seconds", "cpu_s", "load")),
    )  # fmt: skip


def train(network: Network, work: Path) -> None:
    """Train a network, and before it what its figure needs; a run that has ended is not repeated."""
    for other in NETWORKS:
        if other.name in network.after:
            train(other, work)
    timing = work / "runs" / f"{network.run}.json"
    if timing.exists():
        return
    prepared = work / f"{network.data.__name__}.done"
    if not prepared.exists():
        work.mkdir(parents=True, exist_ok=True)
        network.data(work)
        prepared.touch()
    began, used = time.monotonic(), processor_s()
    command(
        work, "train", ROOT / "configs" / f"{network.config}.yaml", f"name={network.run}", "tracking.wandb=disabled",
        *network.overrides,
    )  # fmt: skip
    found = {"seconds": time.monotonic() - began, "cpu_s": processor_s() - used, "load": os.getloadavg()[2]}
    timing.write_text(json.dumps(found))


def processor_s() -> float:
    """Processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def collage(work: Path) -> None:
    """What networks showed at their last evaluation, side by side."""
    found = [(title, sorted((work / "runs" / run / "pictures").glob(f"*-{name}.png"))) for title, run, name in SHOWN]
    sheets = [(title, Image.open(files[-1]).convert("RGB")) for title, files in found if files]
    if len(sheets) < len(SHOWN):
        return
    page = Image.new("RGB", (len(sheets) * (PANEL[0] + GAP) - GAP, PANEL[1] + TITLE), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for number, (title, sheet) in enumerate(sheets):
        left = number * (PANEL[0] + GAP)
        scaled = sheet.resize((PANEL[0], round(sheet.height * PANEL[0] / sheet.width)), Image.Resampling.LANCZOS)
        page.paste(scaled.crop((0, 0, PANEL[0], min(PANEL[1], scaled.height))), (left, TITLE))
        draw.text((left + 2, 2), title, "black", font)
    page.quantize(64).save(RESULTS.with_suffix(".png"), optimize=True)


def known_rows() -> dict[str, tuple[str, ...]]:
    """The rows of the last table."""
    if not RESULTS.exists():
        return {}
    rows = [tuple(cell.strip() for cell in line.split("|")) for line in RESULTS.read_text().splitlines()]
    return {row[0]: row for row in rows if len(row) == len(HEADER) and row[0] in {one.name for one in NETWORKS}}


def written(rows: dict[str, tuple[str, ...]]) -> str:
    """The table, in the order of NETWORKS."""
    lines = [HEADER, *(rows[one.name] for one in NETWORKS if one.name in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    cells = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    head = f"networks trained on {os.cpu_count()} cores, FP32: python -m tests.bench.networks"
    note = "load: of the machine over the last 15 minutes; above its cores, other work took processor time as well"
    return "\n".join([head, note, "", *(line.rstrip() for line in cells)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
