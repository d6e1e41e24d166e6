"""The sample kinds as models see them; see `data.kind` for how samples of a kind are stored and read."""

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
    """The part of a sample kind that models see."""

    name: ClassVar[str]
    """Name of the kind in a model's `data_kind`, in index.json, and in `bigtrain data pack --kind`."""

    unit: ClassVar[str] = "samples"
    """What a sample is, in the plural; for a stream of text, what it is counted in."""

    counted: ClassVar[str] = ""
    """What the weights of a batch count, in the plural, if it is not `unit`: the tokens of captions."""

    of_tokens: ClassVar[bool] = False
    """Whether a sample contains `model.context` tokens, so that its model can generate text."""

    takes_image: ClassVar[bool] = False
    """Whether the text of a sample describes an image."""

    @abstractmethod
    def example_batch(
        self, config: ModelConfig, vocabulary: int, count: int, random: np.random.Generator, documents: bool = False
    ) -> Arrays:
        """A batch of random valid values, with the names, dtypes and shapes of the loader's batches.

        Args:
            vocabulary: Size of the vocabulary, or number of classes.
            count: Number of samples.
            documents: Whether sequences contain several documents; kinds without a document mask ignore it.
        """

    def units(self, context: int) -> int:
        """Number of `unit`s that one sample counts for."""
        return 1


KINDS: Registry[BatchKind] = Registry(
    "sample kind",
    BatchKind,  # type: ignore[type-abstract]  # what inherits it is not
    package="bigtrain.data.kinds",
    tag=None,
    where="data_kind",
)


def batch_kind(config: ModelConfig | type[ModelConfig]) -> BatchKind:
    """The sample kind that a model is trained on.

    Raises:
        UserError: There is no such kind.
    """
    return KINDS[config.data_kind]()
