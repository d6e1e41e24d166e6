"""Data sets of packed shards, read without a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bigtrain.data.index import ShardIndex
from bigtrain.data.loader import Loader, StepBatch
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.streaming.store import open_index

if TYPE_CHECKING:
    import numpy as np

    from bigtrain.data.tokenizers import Tokenizer


class DataSet:
    """A data set of packed shards, which yields the same arrays as in a run.

    Args:
        index: The index of the shards (index.json).
        context: Tokens of a sequence; ignored for images and arrays.
    """

    def __init__(self, index: ShardIndex, context: int) -> None:
        self.index, self.context = index, context if index.of_tokens else 1

    def __len__(self) -> int:
        """Number of samples (sequences, images or arrays) in one epoch."""
        return sum(self.index.sequence_counts(self.context))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Iterate over the samples of one epoch, in the order of a run with seed 0, without a batch dimension."""
        for batch in self.batches(1, epochs=1):
            for arrays in batch.micro_batches:
                yield {name: value[0] for name, value in arrays.items()}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer with which the shards were made; None for images and arrays."""
        return None if self.index.tokenizer is None else self.index.load_tokenizer()

    def batches(
        self, size: int, *, seed: int = 0, epochs: int = 1, first_step: int = 0, shuffle_window: int = 8
    ) -> Iterator[StepBatch]:
        """Iterate over batches in the order of a run with this seed and `batch.size`.

        Args:
            size: Samples of a batch. Samples at the end of the last epoch that do not fill a batch are dropped.
            seed: Seed of the order.
            epochs: Number of epochs.
            first_step: Step of the first batch, as in a run that resumes at this step.
            shuffle_window: Number of shards whose sequences are shuffled together, as `data.shuffle_window`.

        Returns:
            Batches with `step` and `micro_batches`, which has one element: {"tokens": int64 (size, context), ...}.
        """
        order = SampleOrder(seed, self.index.fingerprint, self.index.sequence_counts(self.context), shuffle_window)
        with Loader(self.index, order, batch_size=size, context=self.context, seed=seed) as loader:
            yield from loader.batches(first_step, epochs * len(self) // size)


def open_data(place: str | os.PathLike[str], context: int = 1024) -> DataSet:
    """Open a directory of packed shards as a data set.

    Args:
        place: Path or URL of the directory, as in `data.train`.
        context: Tokens of a sequence; ignored for images and arrays.

    Raises:
        UserError: There are no shards, or they are damaged.
    """
    return DataSet(open_index(os.fspath(place)), context)
