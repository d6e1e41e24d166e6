"""A sample kind of your own, sounds with a class (`KEY.wav` + `KEY.cls`), and a model that learns from them."""

import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch.nn.functional as F
from torch import nn

from bigtrain.config import UserError
from bigtrain.data.formats.images import MAX_LABEL_BYTES, decode_label
from bigtrain.data.formats.tar import TarSample
from bigtrain.data.index import ShardIndex
from bigtrain.data.kind import SampleKind, Scanner
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.packing.sample import Means, PackedMember, Sample, Span
from bigtrain.data.reading import Reader, SampleReader, read_bytes
from bigtrain.data.scanning import Scan
from bigtrain.data.shard import Shard
from bigtrain.data.sidecar import Rows, spans_fit
from bigtrain.data.streaming.store import ShardStore
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.models.batches import KINDS, Arrays
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.models.plain import Batch, LossSum, PlainConfig, PlainModel

MAX_SOUND_BYTES = 1 << 26


@KINDS.register
class Sounds(SampleKind):
    """Sounds of one length and rate, mono, 16 bits; a row of the sidecar is byte offset, bytes, class."""

    name = "sounds"
    unit = "sounds"
    layout = "KEY.wav with KEY.cls"

    def columns(self, index: ShardIndex) -> int:
        return 3

    def rows_fit(self, index: ShardIndex, shard: Shard, rows: Rows) -> bool:
        return spans_fit(rows[:, 0], rows[:, 1], shard.filesize) and int(rows[:, 2].max()) < self.outputs(index)

    def recognises(self, sample: TarSample) -> bool:
        return "wav" in sample.suffixes

    def scanner(self, first: TarSample, tokenizer: Tokenizer | None) -> Scanner:
        return SoundScanner()

    def find(self, inputs: Sequence[str | Path], options: PackOptions) -> Sequence[Sample]:
        """FOLDER/CLASS/NAME.wav, classes numbered by their sorted names."""
        folder = Path(inputs[0])
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        return [
            SoundFile(Span.whole(path), number)
            for number, name in enumerate(classes)
            for path in sorted((folder / name).glob("*.wav"))
        ]

    def open_reader(
        self, index: ShardIndex, context: int, document_mask: bool, open_shards: int, store: ShardStore
    ) -> Reader:
        return SoundReader(index, open_shards, store)

    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        return {
            "keys": random.integers(0, 2**62, count),
            "sounds": random.normal(size=(count, *config.sample_arrays["sounds"])).astype(np.float32),
            "labels": random.integers(0, max(1, vocabulary), count),
            "weights": np.ones(count, np.float32),
        }


class SoundScanner(Scanner):
    noun = "sound"

    def __init__(self) -> None:
        self.facts: dict[str, int] | None = None
        self.classes = 0

    def add(self, sample: TarSample) -> tuple[int, ...]:
        sound, label = sample.one("wav"), sample.one("cls")
        values, rate = decoded(sample.read(sound, MAX_SOUND_BYTES), sample.where)
        number = decode_label(sample.read(label, MAX_LABEL_BYTES), "cls", sample.where)
        facts = {"rate": rate, "frames": len(values)}
        if self.facts not in (None, facts):
            raise UserError(f"the sound has {facts}; the first has {self.facts}", sample.where)
        self.facts, self.classes = facts, max(self.classes, number + 1)
        return sound.offset, sound.size, number

    def result(self, rows: Rows) -> Scan:
        return Scan("sounds", rows, classes=self.classes, facts=self.facts)


class SoundReader(SampleReader):
    def blank(self, count: int) -> Arrays:
        assert self._index.facts is not None
        return {
            "sounds": np.zeros((count, self._index.facts["frames"]), np.float32),
            "labels": np.zeros(count, np.int64),
            "weights": np.zeros(count, np.float32),
        }

    def fill(self, arrays: Arrays, place: int, descriptor: int, row: list[int], where: str) -> None:
        offset, size, label = row
        arrays["sounds"][place], _ = decoded(read_bytes(descriptor, offset, size, where), where)
        arrays["labels"][place] = label


@dataclass(frozen=True)
class SoundFile:
    """A sample before it is packed."""

    sound: Span
    label: int

    @property
    def bytes(self) -> int:
        return self.sound.size

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.sound.path,)

    def members(self, means: Means) -> list[PackedMember]:
        data = self.sound.read()
        decoded(data, str(self.sound.path))
        return [PackedMember("wav", data), PackedMember("cls", str(self.label).encode())]


def decoded(data: bytes, where: str) -> tuple[np.ndarray, int]:
    """Values in -1..1, float32 (frames,), and the rate."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                raise UserError("the sound is not mono of 16 bits", where)
            return np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(2**15), file.getframerate()
    except (wave.Error, EOFError) as error:
        raise UserError(f"not a WAV file: {error}", where) from None


@FAMILIES.register
class Config(PlainConfig):
    """The keys under `model` in the YAML."""

    data_kind: ClassVar[str] = "sounds"
    arch: Literal["sound-model"] = "sound-model"
    frames: int
    width: int = 32
    layers: int = 2

    @property
    def sample_arrays(self) -> dict[str, tuple[int, ...]]:
        return {"sounds": (self.frames,)}

    def build(self, vocab_size: int) -> nn.Module:
        return SoundModel(self, vocab_size)


class SoundModel(PlainModel):
    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(config.frames, config.width)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers))
        self.head = nn.Linear(config.width, classes)

    def forward(self, batch: Batch) -> LossSum:
        x = self.first(batch["sounds"])
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        losses = F.cross_entropy(self.head(x).float(), batch["labels"], reduction="none")
        return LossSum((losses * batch["weights"]).sum(), batch["weights"].sum())
