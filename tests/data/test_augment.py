"""Augmented images are a function of seed, epoch and sample; the random changes are those of training alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.data import augmenter, reading
from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig
from bigtrain.data.augmenter import augmented, evaluated
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.loader import EvaluationLoader, Loader
from bigtrain.data.order.mixture import Sources
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.models.batches import Arrays
from bigtrain.run import load_config
from bigtrain.training.prepare import prepare

COUNT, SIDE, CLASSES, BATCH = 24, 12, 3, 10
CROP = {"name": "random_crop", "padding": 3}
NORMALIZE = {"name": "normalize", "mean": [0.5], "std": [0.25]}
MIXUP = {"name": "mixup", "alpha": 1.0}
CHAINS = [
    [CROP, {"name": "horizontal_flip"}],
    [{"name": "random_affine", "degrees": 20, "translate": 0.1, "scale": [0.8, 1.2], "shear": 10}, NORMALIZE],
    [{"name": "random_resized_crop", "size": 8}, MIXUP, NORMALIZE],
]


def chain(*entries: dict[str, Any]) -> tuple[AugmentationConfig, ...]:
    return TypeAdapter(tuple[Annotated[AugmentationConfig, AUGMENTATIONS], ...]).validate_python(entries)


@pytest.fixture
def index(write_images: Callable[..., Path]) -> ShardIndex:
    """Two dozen images, each of its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE), dtype=np.uint8)
    directory = write_images(pixels, [number % CLASSES for number in range(COUNT)])
    index_directory(directory)
    return load_index(directory)


def steps(index: ShardIndex, entries: Sequence[dict[str, Any]], ranks: int = 1, **options: Any) -> list[Arrays]:
    """The global batches of five steps, more than two epochs, put together of what each rank reads."""
    found: list[list[Arrays]] = []
    for rank in range(ranks):
        order = SampleOrder(1, index.fingerprint, index.sequence_counts(1), 1)
        how = {"batch_size": BATCH, "context": 1, "dp_rank": rank, "dp_size": ranks, "seed": 1, **options}
        with Loader(index, order, augment=chain(*entries), **how) as loader:
            found.append([joined(loader.batch(step).micro_batches) for step in range(5)])
    return [{name: x[:BATCH] for name, x in joined(parts).items()} for parts in zip(*found, strict=True)]


def joined(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(a: Sequence[Arrays], b: Sequence[Arrays]) -> bool:
    return all(np.array_equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in ("images", "labels"))


@pytest.mark.parametrize("entries", CHAINS, ids=lambda entries: entries[0]["name"])
def test_no_layout_worker_or_resume_changes_an_image(index: ShardIndex, entries: list[dict[str, Any]]) -> None:
    alone = steps(index, entries)
    for other in (
        steps(index, entries, ranks=3),
        steps(index, entries, ranks=2, micro_size=2),
        steps(index, entries, streaming=StreamingConfig(threads=3)),
    ):
        assert same(alone, other)
    order = SampleOrder(1, index.fingerprint, index.sequence_counts(1), 1)
    with Loader(index, order, augment=chain(*entries), batch_size=BATCH, context=1, seed=1) as resumed:
        assert same([joined(batch.micro_batches) for batch in resumed.batches(3, 5)], alone[3:])
    assert not same(alone, steps(index, entries, seed=2)), "the seed of the run changes nothing"


def test_a_sample_is_changed_otherwise_in_each_epoch(index: ShardIndex) -> None:
    order = SampleOrder(1, index.fingerprint, index.sequence_counts(1), 1)
    with Loader(index, order, augment=chain(CROP), batch_size=COUNT, context=1) as loader:
        first, second = (loader.batch(step).micro_batches[0]["images"] for step in range(2))
    place = [order.take(epoch * COUNT, COUNT).sequence.argsort() for epoch in range(2)]
    changed = [not np.array_equal(a, b) for a, b in zip(first[place[0]], second[place[1]], strict=True)]
    assert sum(changed) > COUNT / 2


def test_crops_and_flips_are_parts_of_the_image_or_its_mirror(index: ShardIndex) -> None:
    plain, shown = steps(index, [])[0]["images"], steps(index, CHAINS[0])[0]["images"]
    padded = np.pad(plain, ((0, 0), (3, 3), (3, 3), (0, 0)))
    moves = set()
    for whole, image in zip(padded, shown, strict=True):
        parts = {
            (row, column, way): whole[row : row + SIDE, column : column + SIDE][:, ::way]
            for row in range(7)
            for column in range(7)
            for way in (1, -1)
        }
        moves.add(next(move for move, part in parts.items() if np.array_equal(part, image)))
    assert len(moves) > 5
    assert {way for *_, way in moves} == {1, -1}


def test_mixed_images_and_labels_have_the_same_shares(index: ShardIndex) -> None:
    plain, mixed = steps(index, [NORMALIZE])[0], steps(index, [NORMALIZE, MIXUP])[0]
    assert mixed["labels"].shape == (BATCH, CLASSES)
    assert mixed["labels"].sum(axis=1) == pytest.approx(np.ones(BATCH))
    shares = []
    for number, (image, labels) in enumerate(zip(mixed["images"], mixed["labels"], strict=True)):
        # The partner, and its share, are those that explain the image.
        own = plain["images"][number]
        fits = []
        for other, label in zip(plain["images"], plain["labels"], strict=True):
            difference = (other - own).ravel()
            share = float(difference @ (image - own).ravel() / max(float(difference @ difference), 1e-9))
            fits.append((float(np.abs(own + share * (other - own) - image).max()), share, int(label)))
        error, share, label = min(fits)
        assert error < 1e-4
        expected = np.zeros(CLASSES)
        expected[plain["labels"][number]] += 1 - share
        expected[label] += share
        assert labels == pytest.approx(expected, abs=1e-4)
        shares.append(share)
    assert np.ptp(shares) > 0.2


def test_an_evaluation_is_normalized_and_cropped_in_the_middle_but_not_random(index: ShardIndex) -> None:
    entries = [{"name": "random_crop", "size": 8}, {"name": "horizontal_flip", "p": 1.0}, NORMALIZE, MIXUP]
    with EvaluationLoader(index, batches=1, batch_size=16, context=1, augment=chain(*entries)) as loader:
        (shown,) = (batch.micro_batches[0] for batch in loader)
    with EvaluationLoader(index, batches=1, batch_size=16, context=1) as loader:
        (plain,) = (batch.micro_batches[0] for batch in loader)
    assert shown["images"] == pytest.approx((plain["images"][:, 2:10, 2:10] / 255 - 0.5) / 0.25, abs=1e-5)
    assert np.array_equal(shown["labels"], plain["labels"])


def test_fillers_have_the_shape_of_what_is_augmented_and_no_weight(index: ShardIndex) -> None:
    batch = steps(index, CHAINS[2], ranks=1)[0]
    order = SampleOrder(1, index.fingerprint, index.sequence_counts(1), 1)
    how = {"batch_size": BATCH, "context": 1, "dp_rank": 2, "dp_size": 3, "seed": 1}
    with Loader(index, order, augment=chain(*CHAINS[2]), **how) as loader:
        last = joined(loader.batch(0).micro_batches)
    assert last["images"].shape[1:] == batch["images"].shape[1:] == (8, 8, 1)
    assert last["weights"].tolist() == [1, 1, 0, 0]


def test_a_mixture_of_sources_is_augmented_as_one(index: ShardIndex, write_images: Callable[..., Path]) -> None:
    more = write_images(np.zeros((8, SIDE, SIDE), np.uint8), [4] * 8, "more")
    index_directory(more)
    sources = Sources.by_content({"a": index, "b": load_index(more)})
    order = SampleOrder(1, "x", sources.sequence_counts(1), 1)
    with Loader(sources, order, augment=chain(MIXUP), batch_size=COUNT + 8, context=1) as loader:
        (batch,) = loader.batch(0).micro_batches
    assert batch["labels"].shape == (COUNT + 8, 5)
    assert batch["sources"].sum(axis=0).tolist() in ([COUNT, 8], [8, COUNT])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"name": "random_crop", "size": 13}], "random_crop: the image is smaller than the crop of 13 x 13"),
        ([{"name": "random_crop", "padding": 12}], "crops that contain only padding"),
        ([{"name": "normalize", "mean": [0.1, 0.2], "std": [1]}], "mean has 2 numbers, but the image has 1 channels"),
        ([NORMALIZE, NORMALIZE], "already normalized"),
        ([NORMALIZE, {"name": "random_affine", "degrees": 5}], "list normalize after"),
        ([MIXUP, MIXUP], "mixup and mixup both mix"),
    ],
)
def test_what_does_not_fit_the_images_is_refused(index: ShardIndex, entries: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        augmented(chain(*entries), index)
    assert caught.value.where == "data.augment"


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "horizontal_flip", "probability": 1},
        {"name": "horizontal_flip", "p": 1.5},
        {"name": "random_resized_crop"},
        {"name": "random_resized_crop", "size": 8, "scale": [1.0, 0.5]},
        {"name": "normalize", "mean": [0.5], "std": [0]},
        {"name": "mixup", "alpha": 0},
        {"name": "horizontal_flop"},
    ],
)
def test_wrong_keys_are_refused(entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"augment|probability|p|size|scale|std|alpha"):
        chain(entry)


def test_tokens_are_not_augmented_and_classes_are_needed_to_mix(packed: ShardIndex, index: ShardIndex) -> None:
    with pytest.raises(UserError, match="the shards hold tokens"):
        augmented(chain(CROP), packed)
    captions = index.model_copy(update={"kind": "captions"})
    with pytest.raises(UserError, match="mixes the classes of images, but these images have none"):
        augmented(chain(MIXUP), captions)


def recipe(index: ShardIndex, tmp_path: Path, image_size: int = SIDE, **data: Any) -> dict[str, Any]:
    """What a run on these images trains."""
    config = {
        "name": "x",
        "model": {"arch": "vit", "image_size": image_size, "channels": 1, "width": 8},
        "data": {"train": str(index.directory), **data},
        "batch": {"size": 4},
        "duration": "2 steps",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return prepare(load_config(tmp_path / "config.yaml")).what


def test_augmentation_is_a_part_of_what_is_trained(index: ShardIndex, tmp_path: Path) -> None:
    plain = recipe(index, tmp_path)
    assert recipe(index, tmp_path, augment=[]) == plain
    assert "augment" not in plain["data"]  # as in runs of before
    changed = recipe(index, tmp_path, augment=[CROP])
    assert changed["data"]["augment"] == [{"name": "random_crop", "size": None, "padding": 3, "fill": 0}]
    assert recipe(index, tmp_path, augment=[{"name": "random_crop", "size": 8}], image_size=8)
    with pytest.raises(UserError, match="images are 8 x 8 x 1"):
        recipe(index, tmp_path, augment=[{"name": "random_crop", "size": 8}])


def test_an_augmentation_of_a_user_s_own_is_one_file(index: ShardIndex, tmp_path: Path) -> None:
    text = (Path(augmenter.__file__).with_name("augmentation.py")).read_text()
    example = text.split('"""')[1].split("\n\n", 1)[1].split("\n\nAn image")[0]
    imports = "from typing import Annotated, Literal\nfrom annotated_types import Ge, Le\n"
    imports += "from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig\n"
    (tmp_path / "invert.py").write_text(
        f"from __future__ import annotations\n{imports}" + "\n".join(line[4:] for line in example.splitlines())
    )
    load_plugin(str(tmp_path / "invert.py"))
    assert recipe(index, tmp_path, augment=[{"name": "invert"}])["data"]["plugin"]
    plain, shown = steps(index, []), steps(index, [{"name": "invert", "p": 1.0}])
    assert np.array_equal(255 - plain[0]["images"], shown[0]["images"])


def test_an_image_alone_is_shown_as_in_an_evaluation() -> None:
    image = np.full((4, 4, 1), 255, np.uint8)
    assert evaluated(chain(CROP, NORMALIZE), image) == pytest.approx(np.full((4, 4, 1), 2.0))


def test_a_batch_that_spans_more_shards_than_stay_open_is_read_in_parts() -> None:
    assert [list(part) for part in reading._parts([0, 1, 0, 2, 2, 1, 3], 2)] == [[0, 1, 2], [3, 4, 5], [6]]
