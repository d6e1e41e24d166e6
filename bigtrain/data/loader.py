"""The loader: turns the global order into each rank's micro-batches, which a thread prepares ahead.

The loader holds no state that a checkpoint needs: the batch of a step is a function of the step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.data.augmentation import AugmentationConfig
from bigtrain.data.augmenter import Augmenter
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.order.mixture import Sources
from bigtrain.data.order.sample_order import Draw, FixedOrder, IntArray, Order, sequence_keys
from bigtrain.data.threads import WORTH_THREADS, Threads
from bigtrain.models.batches import Arrays


@dataclass(frozen=True)
class Distribution:
    """How a global batch is divided over the data-parallel ranks; equal on every rank.

    A slot is a position in the global batch. If the division is uneven, slots without a sequence are added: fillers,
    which have weight zero.
    """

    batch_size: int
    ranks: int
    n_micro: int
    """Number of micro-batches per rank."""
    micro_batch: int
    """Number of slots per micro-batch."""

    @property
    def per_rank(self) -> int:
        """Number of slots per rank, including fillers."""
        return self.n_micro * self.micro_batch

    @property
    def fillers(self) -> int:
        """Number of fillers over all ranks."""
        return self.per_rank * self.ranks - self.batch_size

    def slots(self, rank: int) -> range:
        """A rank's slots of the global batch; slots at or past batch_size are fillers."""
        return range(rank * self.per_rank, (rank + 1) * self.per_rank)


def distribute(batch_size: int, ranks: int, micro_size: int, *, least: int = 1, multiple: int = 1) -> Distribution:
    """Divide a global batch over ranks, as evenly as possible, into micro-batches of at most `micro_size` sequences.

    Args:
        least, multiple: The number of micro-batches per rank is at least `least` and divisible by `multiple`, as a
            pipeline schedule requires.

    Raises:
        ValueError: An argument is below 1.
    """
    if min(batch_size, ranks, micro_size, least, multiple) < 1:
        raise ValueError(f"batch {batch_size}, ranks {ranks} and micro-batch {micro_size} must be at least 1")
    per_rank = -(-batch_size // ranks)
    n_micro = max(-(-per_rank // micro_size), least)
    n_micro = -(-n_micro // multiple) * multiple
    return Distribution(batch_size, ranks, n_micro, -(-per_rank // n_micro))


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of the global batch of one step."""

    step: int
    micro_batches: list[Arrays]
    """The named arrays of each micro-batch of B sequences, with C tokens each and from S sources.

    Text: tokens, targets, weights (B, C), keys (B,); with a document mask also documents, positions (B, C).
    Images: images (B, height, width, channels), uint8, or float32 if normalized; labels int64 (B,), or float32
    (B, classes) if images are mixed; weights, keys (B,).
    Captions: images as before; tokens, weights (B, C), keys (B,).
    Arrays: each array by its name (B, ...); labels (B,) if there are classes; weights, keys (B,).
    Classified texts: tokens (B, C); lengths, labels, weights, keys (B,).
    Preferences: tokens, targets, weights (B, 2, C), keys (B,).
    Mixtures also have sources (B, S), with a one for the source of each sequence."""
    sample_ids: list[str] = field(default_factory=list)
    """Ids of all samples of the global batch, in global order; empty unless requested."""


class Loader:
    """Yields one rank's part of each global batch.

    Args:
        data: A shard directory, its index, or several sources.
        order: The global order; its counts must be those of the data at this context.
        batch_size: Sequences per global batch.
        context: Tokens per sequence or caption; unused for images and arrays.
        dp_rank: This rank's number among the data-parallel ranks, which read different data.
        dp_size: Number of data-parallel ranks.
        micro_size: Maximum number of sequences per micro-batch; None: all sequences of the rank.
        least_micro_batches, micro_batch_multiple: Constraints of `distribute`.
        seed: The run's seed, for the keys of dropout and for augmentations.
        document_mask: Whether batches hold the arrays `documents` and `positions`.
        log_samples: Whether batches carry the sample ids of the global batch.
        prefetch: Number of batches prepared ahead.
        source: Name of the data in sample ids and in the position, if the data is a single directory.
        streaming: Settings for fetching remote shards, and for the number of decoding threads.
        augment: Augmentations of the images, in their order.
        training: Whether augmentations are applied as in training or as in an evaluation.

    Raises:
        ValueError: The order does not fit the data, or `dp_rank` is not below `dp_size`.
    """

    def __init__(
        self,
        data: Sources | ShardIndex | str | Path,
        order: Order,
        *,
        batch_size: int,
        context: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        micro_size: int | None = None,
        least_micro_batches: int = 1,
        micro_batch_multiple: int = 1,
        seed: int = 0,
        document_mask: bool = False,
        log_samples: bool = False,
        prefetch: int = 2,
        source: str = "train",
        streaming: StreamingConfig | None = None,
        augment: Sequence[AugmentationConfig] = (),
        training: bool = True,
    ) -> None:
        self.sources = Sources.of(data, source)
        if order.counts.tolist() != self.sources.sequence_counts(context, document_mask):
            raise ValueError("the order was made for other data or another context")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"rank {dp_rank} is not among {dp_size}")
        self.distribution = distribute(
            batch_size,
            dp_size,
            micro_size or batch_size,
            least=least_micro_batches,
            multiple=micro_batch_multiple,
        )
        self._order, self._seed, self._rank = order, seed, dp_rank
        self._log_samples, self._prefetch = log_samples, prefetch
        # A batch may cross the boundary of two windows.
        self._reader = self.sources.open_reader(context, document_mask, 2 * order.window, streaming)
        self._threads = Threads(_threads_for(self.sources.first, streaming))
        self._reader.use(self._threads)
        self._augmenter: Augmenter | None = None
        if augment:
            self._augmenter = Augmenter(
                augment, self.sources.first, self.sources.vocab_size, seed=seed, training=training,
                threads=self._threads,
            )  # fmt: skip
        self._active: _Ahead | None = None
        # The reader and the order have caches, and the caller and the thread of `batches` may both use them.
        self._lock = threading.RLock()

    @property
    def data_wait_s(self) -> float:
        """Seconds that the caller waited for the last batch."""
        return 0.0 if self._active is None else self._active.wait_s

    def batch(self, step: int) -> StepBatch:
        """Read this rank's part of the global batch of `step`, without prefetching. Steps are counted from 0."""
        shape = self.distribution
        start, slots = step * shape.batch_size, shape.slots(self._rank)
        own = min(slots.stop, shape.batch_size) - slots.start
        with self._lock:
            if self.sources.streams:
                self._reader.expect(self._order.upcoming(start, shape.batch_size).tolist())
            arrays, shards = self._read(step, slots.start, max(0, own))
        missing = shape.per_rank - len(shards)
        if missing:
            blank = self._reader.blank(missing)
            blank = blank if self._augmenter is None else self._augmenter.apply(blank, None)
            arrays = {name: np.concatenate([values, blank[name]]) for name, values in arrays.items()}
        if len(self.sources.names) > 1:
            arrays["sources"] = self.sources.one_hot(shards, shape.per_rank)
        arrays["keys"] = sequence_keys(self._seed, step, np.arange(slots.start, slots.stop))
        size = shape.micro_batch
        micro_batches = [
            {name: values[first : first + size] for name, values in arrays.items()}
            for first in range(0, shape.per_rank, size)
        ]
        return StepBatch(step, micro_batches, self.sample_ids(step) if self._log_samples else [])

    def _read(self, step: int, first: int, count: int) -> tuple[Arrays, IntArray]:
        """Read the samples of `count` slots of a global batch from slot `first` on; fewer if the data ends.

        Returns:
            The arrays, and the shard of each sample.
        """
        batch_size, augmenter = self.distribution.batch_size, self._augmenter
        start, partners = step * batch_size, None
        if augmenter is None or not augmenter.mixes:
            draw = self._order.take(start + first, count)
        else:
            own = np.arange(first, first + count)
            partners = augmenter.partners(step, batch_size)[own]
            slots = np.concatenate([own, np.setdiff1d(partners, own)])
            draw = Draw(*(part[slots] for part in self._order.take(start, batch_size)))
            row_of = np.zeros(batch_size, np.int64)
            row_of[slots] = np.arange(len(slots))
            partners = row_of[partners]
        arrays = self._reader.read(draw.shard, draw.sequence)
        arrays = arrays if augmenter is None else augmenter.apply(arrays, draw, partners)
        return arrays, draw.shard[:count]

    def sample_ids(self, step: int) -> list[str]:
        """The ids of all samples that `step` consumes, in global order."""
        with self._lock:
            draw = self._order.take(step * self.distribution.batch_size, self.distribution.batch_size)
            return self._reader.sample_ids(self.sources.names[0], draw.shard, draw.sequence)

    def batches(self, first_step: int = 0, stop_step: int | None = None) -> Iterator[StepBatch]:
        """Yield the batches from `first_step` on, prepared ahead; without end, or up to but excluding `stop_step`.

        An error of the reading thread is raised in place of its batch. A new call ends the iterator of an earlier one.
        """
        self._stop()
        self._active = _Ahead(self.batch, first_step, stop_step, self._prefetch)
        return self._active

    def position(self, step: int) -> dict[str, Any]:
        """The position in the data after `step` global batches: the step, and the sequences consumed by source."""
        consumed = self._order.drawn(step * self.distribution.batch_size).tolist()
        return {"step": step, "drawn": dict(zip(self.sources.names, consumed, strict=True))}

    def close(self) -> None:
        """Stop the reading thread, and close open shards."""
        self._reader.interrupt()
        self._stop()
        self._threads.close()
        self._reader.close()

    def _stop(self) -> None:
        if self._active is not None:
            self._active.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class EvaluationLoader:
    """Yields the first sequences of the held-out data, the same ones each time, divided over ranks as in training.

    Args:
        data: A shard directory or its index.
        batches: Maximum number of global batches. If the data ends earlier, fillers complete the last batch.
        sequences: Maximum number of sequences, independent of the batch size; replaces `batches`.
        loader: Further arguments of `Loader`.

    Raises:
        UserError: The data holds no sequence.
    """

    def __init__(
        self, data: ShardIndex | str | Path, *, batches: int, sequences: int | None = None, context: int, **loader: Any
    ) -> None:
        index = data if isinstance(data, ShardIndex) else load_index(data)
        order = FixedOrder(index.sequence_counts(context, loader.get("document_mask", False)), sequences)
        self._loader = Loader(index, order, context=context, **{"source": "validation", "training": False, **loader})
        if not order.sequences_per_epoch:
            raise UserError(
                "the validation data holds no sequence", where=str(index.directory), fix="Hold out more data."
            )
        batch_size = self._loader.distribution.batch_size
        whole = -(-order.sequences_per_epoch // batch_size)
        self._count = min(batches, whole) if sequences is None else whole

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[StepBatch]:
        return self._loader.batches(0, self._count)

    def close(self) -> None:
        """Stop the reading thread, and close open shards."""
        self._loader.close()

    def __enter__(self) -> EvaluationLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _threads_for(index: ShardIndex, streaming: StreamingConfig | None) -> int | None:
    """Number of decoding threads: from the config, else one for small images, else None (one per core)."""
    if streaming is not None and streaming.threads is not None:
        return streaming.threads
    height, width, _ = index.sample_kind.image_shape(index) or (0, 0, 0)
    return 1 if height * width < WORTH_THREADS else None


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _End:
    pass


class _Ahead(Iterator[StepBatch]):
    """Iterator over the batches of consecutive steps. A thread prepares up to `ahead` batches in advance."""

    def __init__(self, make: Callable[[int], StepBatch], first: int, stop: int | None, ahead: int) -> None:
        self.wait_s = 0.0
        self._make, self._next, self._stop_step = make, first, stop
        self._ready: queue.Queue[StepBatch | _Failure | _End] = queue.Queue(maxsize=max(1, ahead))
        self._closing = threading.Event()
        self._ended: _Failure | _End | None = None
        self._thread = threading.Thread(target=self._run, name="bigtrain-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> StepBatch:
        if self._ended is None:
            began = time.monotonic()
            item = self._ready.get()
            self.wait_s = time.monotonic() - began
            if isinstance(item, StepBatch):
                return item
            self._ended = item
        if isinstance(self._ended, _Failure):
            raise self._ended.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread, and end the iterator."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()
        self._ended = self._ended or _End()

    def _run(self) -> None:
        item: StepBatch | _Failure | _End
        while not self._closing.is_set():
            if self._stop_step is not None and self._next >= self._stop_step:
                self._ready.put(_End())
                return
            try:
                item = self._make(self._next)
            except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
                item = _Failure(error)
            self._next += 1
            self._ready.put(item)
            if isinstance(item, _Failure):
                return
