"""A data set without a run."""

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
    """A data set of packed shards, which yields the same arrays as a run gets.

    Args:
        index: The index of the shards (index.json).
        context: Tokens per sequence; unused for images and arrays.
    """

    def __init__(self, index: ShardIndex, context: int) -> None:
        self.index, self.context = index, context if index.of_tokens else 1

    def __len__(self) -> int:
        """Sequences, images or samples of one epoch."""
        return sum(self.index.sequence_counts(self.context))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Each sample of one epoch once, in the order of a run with seed 0; arrays without a batch dimension."""
        for batch in self.batches(1, epochs=1):
            for arrays in batch.micro_batches:
                yield {name: value[0] for name, value in arrays.items()}

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the tokens; None for images and arrays."""
        return None if self.index.tokenizer is None else self.index.load_tokenizer()

    def batches(
        self, size: int, *, seed: int = 0, epochs: int = 1, first_step: int = 0, shuffle_window: int = 8
    ) -> Iterator[StepBatch]:
        """Batches in the order of a run with this seed and `batch.size`.

        Args:
            size: Samples of a batch; the last samples of the last epoch that fill none are dropped.
            seed: Of the order.
            first_step: The step of the first batch: where a run resumes.
            shuffle_window: Shards whose sequences are mixed with each other, as `data.shuffle_window`.

        Returns:
            Batches with `step` and `micro_batches`, of which there is one: {"tokens": int64 (size, context), ...}.
        """
        order = SampleOrder(seed, self.index.fingerprint, self.index.sequence_counts(self.context), shuffle_window)
        with Loader(self.index, order, batch_size=size, context=self.context, seed=seed) as loader:
            yield from loader.batches(first_step, epochs * len(self) // size)


def open_data(place: str | os.PathLike[str], context: int = 1024) -> DataSet:
    """Open a directory of shards, or its URL, as `data.train` names it.

    Args:
        context: Tokens of a sequence; unused for images and arrays.

    Raises:
        UserError: There are no shards, or they are damaged.
    """
    return DataSet(open_index(os.fspath(place)), context)
