"""Applies a config's augmentations to the images of batches; `augmentation` defines what an augmentation is.

The random numbers of a sample depend on (seed, epoch, shard, number in the shard). The sample that it is mixed with
depends on (seed, step, slot in the global batch). Neither depends on rank, worker or micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from bigtrain.config import UserError
from bigtrain.data.augmentation import AugmentationConfig
from bigtrain.data.formats.arrays import LABELS
from bigtrain.data.index import ShardIndex
from bigtrain.data.order.sample_order import Draw, IntArray, hash_words, permutation
from bigtrain.data.threads import Threads
from bigtrain.models.batches import Arrays

if TYPE_CHECKING:
    from bigtrain.data.augmentation import Image

Keys = npt.NDArray[np.uint64]

IMAGES = "images"
WHERE = "data.augment"
_SAMPLES, _PARTNERS = 3, 4
"""Constants that make these hashes of the seed differ from each other and from those of the order."""


class Augmenter:
    """The augmentations of one loader.

    Args:
        chain: The augmentations from the config, in their order.
        index: The index of shards with such images.
        classes: Number of classes of all sources together.
        seed: The run's seed.
        training: Whether images are augmented at random and mixed, or prepared as for an evaluation.
        threads: The threads in which images are augmented.

    Raises:
        UserError: The images do not fit the chain; see `augmented`.
    """

    def __init__(
        self,
        chain: Sequence[AugmentationConfig],
        index: ShardIndex,
        classes: int,
        *,
        seed: int,
        training: bool,
        threads: Threads,
    ) -> None:
        blank = augmented(chain, index)
        self._shape, self._dtype = blank.shape, blank.dtype
        self._chain, self._seed, self._training, self._threads = tuple(chain), seed, training, threads
        self._mixer = next((place for place, one in enumerate(chain) if one.mixes), None) if training else None
        self._classes = classes

    @property
    def mixes(self) -> bool:
        """Whether each image is mixed with another one of its global batch."""
        return self._mixer is not None

    def partners(self, step: int, batch_size: int) -> IntArray:
        """The slot of the global batch with which each slot is mixed: a permutation, int64 of shape (batch_size,)."""
        return permutation(batch_size, self._seed, _PARTNERS, step)

    def apply(self, arrays: Arrays, draw: Draw | None, partners: IntArray | None = None) -> Arrays:
        """Augment the images of a batch.

        Args:
            draw: The positions of the samples in the data; None for fillers.
            partners: For each of the first rows, the row with which it is mixed; the result has only these first rows.
        """
        images, rows = arrays[IMAGES], len(arrays[IMAGES] if partners is None else partners)
        keys = None
        if draw is not None and self._training:
            keys = hash_words(self._seed, _SAMPLES, draw.epoch, draw.shard, draw.sequence)
        found = np.empty((rows, *self._shape), self._dtype)
        shares = np.ones(rows, np.float32)
        if partners is None or keys is None:
            self._threads.each(lambda row: self._finish(found, row, images[row], _random(keys, row)), rows)
        else:
            self._mix(images, keys, partners, found, shares)
        augmented = {name: values[:rows] for name, values in arrays.items()} | {IMAGES: found}
        if self.mixes:
            labels = arrays[LABELS]
            augmented[LABELS] = np.zeros((rows, self._classes), np.float32)
            augmented[LABELS][np.arange(rows), labels[:rows]] = shares
            if partners is not None:
                augmented[LABELS][np.arange(rows), labels[partners]] += 1 - shares
        return augmented

    def _finish(self, found: Image, row: int, image: Image, random: np.random.Generator | None, first: int = 0) -> None:
        found[row] = _through(self._chain[first:], image, random)

    def _mix(self, images: Image, keys: Keys, partners: IntArray, found: Image, shares: Image) -> None:
        """Fill `found` with mixed images, and `shares` with the share of each first image.

        All images pass through the augmentations before the mixing one; only mixed images pass through those after it.
        """
        assert self._mixer is not None
        before, mixer = self._chain[: self._mixer], self._chain[self._mixer]
        randoms = [_random(keys, row) for row in range(len(images))]
        begun: list[Image] = list(images)

        def begin(row: int) -> None:
            begun[row] = _through(before, images[row], randoms[row])

        def finish(row: int) -> None:
            random = randoms[row]
            assert random is not None
            image, shares[row] = mixer.mix(begun[row], begun[partners[row]], random)
            self._finish(found, row, image, random, len(before) + 1)

        self._threads.each(begin, len(images))
        self._threads.each(finish, len(partners))


def evaluated(chain: Sequence[AugmentationConfig], image: Image) -> Image:
    """An image as a network receives it in an evaluation."""
    return _through(chain, image, None)


def augmented(chain: Sequence[AugmentationConfig], index: ShardIndex) -> Image:
    """A black image after all augmentations. It has the shape and dtype that a network receives.

    Raises:
        UserError: The shards hold no images, or no classes to mix; or an augmentation does not support the images.
    """
    shape = index.sample_kind.image_shape(index)
    if shape is None:
        raise UserError(
            f"data.augment is for images, but the shards hold {index.kind}", index.place, "Remove data.augment."
        )
    mixing = [one.name for one in chain if one.mixes]
    if mixing and (index.sample_kind.gives or index.kind) != IMAGES:
        raise UserError(f"'{mixing[0]}' mixes the classes of images, but these images have none", WHERE, "Remove it.")
    if len(mixing) > 1:
        raise UserError(f"{' and '.join(mixing)} both mix images", WHERE, "Keep one of them.")
    black: Image = np.zeros(shape, np.uint8)
    found: list[Image] = []
    for random in (None, np.random.default_rng(0)):
        image = black
        for one in chain:
            try:
                image = one.evaluate(image) if random is None else one.train(image, random)
            except ValueError as error:
                raise UserError(f"{one.name}: {error}", WHERE) from None
        found.append(image)
    if found[0].shape != found[1].shape or found[0].dtype != found[1].dtype:
        raise UserError(
            f"training images would be {_named(found[1])}, but evaluation images {_named(found[0])}",
            WHERE,
            "Return images of the same shape and dtype from `evaluate` and `train` of the augmentation.",
        )
    if found[0].ndim != 3 or found[0].dtype not in (np.uint8, np.float32):
        raise UserError(
            f"the augmentations return {_named(found[0])}",
            WHERE,
            "Return uint8 or float32 arrays of shape (height, width, channels).",
        )
    return found[0]


def with_augmented_size(chain: Sequence[AugmentationConfig], index: ShardIndex) -> ShardIndex:
    """An index whose images have the size that a network receives, after all augmentations.

    Raises:
        UserError: See `augmented`.
    """
    if not chain:
        return index
    height, width, channels = augmented(chain, index).shape
    image = index.image and replace(index.image, height=height, width=width, channels=channels)
    return index.model_copy(update={"image": image})


def _through(chain: Sequence[AugmentationConfig], image: Image, random: np.random.Generator | None) -> Image:
    for one in chain:
        image = one.evaluate(image) if random is None else one.train(image, random)
    return image


def _random(keys: Keys | None, row: int) -> np.random.Generator | None:
    return None if keys is None else np.random.default_rng(int(keys[row]))


def _named(image: Image) -> str:
    return f"{image.dtype} {' x '.join(map(str, image.shape))}"
