"""The sample kinds, and what a batch of each looks like to a model; how a kind is stored and read: `data.kind`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from bigtrain.config.registry import Registry

if TYPE_CHECKING:
    from bigtrain.models.config import ModelConfig

Arrays = dict[str, npt.NDArray[Any]]


class BatchKind(ABC):
    """The half of a sample kind that models see."""

    name: ClassVar[str]
    """What `data_kind` of a model, index.json and `bigtrain data pack --kind` call it."""

    unit: ClassVar[str] = "samples"
    """What a step is counted in, in messages."""

    of_tokens: ClassVar[bool] = False
    """Whether a sample holds `model.context` tokens, so that a model of it can write text."""

    takes_image: ClassVar[bool] = False
    """Whether text is written about an image."""

    @abstractmethod
    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """Random valid content by the names, types and shapes of the loader's batches.

        Args:
            vocabulary: Entries of the vocabulary, or classes.
            count: Samples.
            documents: Whether sequences hold several documents; only kinds with a document mask respect it.
        """

    def units(self, context: int) -> int:
        """How many of `unit` one sample counts for."""
        return 1


KINDS: Registry[BatchKind] = Registry(
    "sample kind",
    BatchKind,  # type: ignore[type-abstract]  # what inherits it is not
    package="bigtrain.data.kinds",
    tag=None,
    where="data_kind",
)


def batch_kind(config: ModelConfig | type[ModelConfig]) -> BatchKind:
    """The kind of data that a model learns from.

    Raises:
        UserError: There is no such kind.
    """
    return KINDS[config.data_kind]()
