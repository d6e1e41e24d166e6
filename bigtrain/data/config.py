"""The sections `data` (what a run trains on) and `streaming` (how the data is read)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from bigtrain.config import NUMBER_OR_TEXT, Bytes, Count, Duration, Section
from bigtrain.config.urls import is_url
from bigtrain.data.augmentation import AUGMENTATIONS, AugmentationConfig
from bigtrain.storage.scheme import check_url


def _name_of(place: str) -> str:
    *_, parent, last = ["data", *(part for part in place.split("/") if part not in ("", ".", ".."))]
    name = parent if last in ("train", "validation") else last
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64] or "data"


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    duration = Duration.parse(value)
    if not duration.is_time:
        raise ValueError(f"{value!r} is not a time: write seconds (20), or for example '20 s'")
    return duration.seconds


def _place(value: str) -> str:
    if not value.strip():
        raise ValueError("the path of the shard directory is empty")
    return check_url(value) if is_url(value) else value


DataPlace = Annotated[str, AfterValidator(_place)]
"""A directory of shards, or its URL."""

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class HeldOutConfig(Section):
    """One of several sets of held-out shards."""

    path: DataPlace
    """A directory of shards, or its URL."""

    name: SourceName | None = None
    """Name in metrics (val_loss/NAME); null: the directory's name, or its parent's for `train` and `validation`."""

    @property
    def source(self) -> str:
        """The given name, or else the name derived from the path."""
        return self.name or _name_of(self.path)


class SourceConfig(HeldOutConfig):
    """One source of a mixture, or a new weight of a source from a step on."""

    weight: Annotated[float, NUMBER_OR_TEXT, Field(ge=0)] = 1.0
    """Share of the sequences, relative to the weights of the other sources; 0: no sequences."""

    from_step: Annotated[Count, Ge(0)] = 0
    """The step from which the weight applies; before its first such step, a source gives no sequences."""


def _form(value: Any) -> str:
    return "list" if isinstance(value, (list, tuple)) else "place"


# The tags make an error refer to the form that the user meant.
Train = Annotated[
    Annotated[DataPlace, Tag("place")] | Annotated[tuple[SourceConfig, ...], Tag("list")], Discriminator(_form)
]
HeldOut = Annotated[
    Annotated[DataPlace, Tag("place")] | Annotated[tuple[HeldOutConfig, ...], Tag("list")], Discriminator(_form)
]


class ConsumedConfig(Section):
    """What the run from which this one branched off had consumed of the data."""

    step: Annotated[int, Ge(0)]
    """The step of the branch."""

    drawn: dict[str, Annotated[int, Ge(0)]]
    """Number of sequences consumed from each source, by the source's fingerprint."""


class DataConfig(Section):
    """The data of a run. The run's identity depends on the data's fingerprint, not on its path."""

    train: Train
    """A directory of shards, as `bigtrain data pack` or `data index` writes it, or its URL (http, https, s3, gs, or a
    scheme of your own); or a mixture: a list of {path, weight, from_step, name}."""

    validation: HeldOut | None = None
    """A directory or URL of held-out shards, or a list of {path, name}; null: no held-out data."""

    document_mask: bool = False
    """Whether a token attends only to its own document inside a packed sequence."""

    shuffle_window: Annotated[int, Ge(1)] = 8
    """Number of shards whose sequences are shuffled together. Each shard is read inside one window per epoch."""

    augment: tuple[Annotated[AugmentationConfig, AUGMENTATIONS], ...] = ()
    """Augmentations of the images, in this order: [{name: random_crop, padding: 2}, {name: mixup, alpha: 0.2}]. Random
    ones apply only to training; sizes and `normalize` apply to evaluations too."""

    consumed: ConsumedConfig | None = None
    """What an earlier run has consumed of the data, which is not read again. `--fork` and `init: {state: all}` write
    this key if data, batch or seed differ from the earlier run."""

    @model_validator(mode="after")
    def _sources_are_possible(self) -> DataConfig:
        self.phases()
        for key in ("train", "validation"):
            named = self.places(key)
            if len(set(named.values())) != len(named):
                raise ValueError(f"{key}: one path has two names: use one name for a source in all its entries")
        return self

    def places(self, key: str) -> dict[str, str]:
        """Paths or URLs by the name of the source.

        Args:
            key: "train" or "validation".

        Raises:
            ValueError: Two paths have the same name, the list is empty, or a validation set is named twice.
        """
        value: str | tuple[HeldOutConfig, ...] | None = self.train if key == "train" else self.validation
        if value is None or isinstance(value, str):
            return {} if value is None else {key: value}
        found: dict[str, str] = {}
        for entry in value:
            if found.setdefault(entry.source, entry.path) != entry.path:
                raise ValueError(f"{key}: two sources have the name '{entry.source}': give each its own name")
        if not found:
            raise ValueError(f"{key}: the list is empty")
        if key == "validation" and len(found) != len(value):
            raise ValueError("validation: a source is listed twice")
        return found

    def phases(self) -> list[tuple[int, dict[str, float]]]:
        """The first step of each phase and the weight of each source in it, in ascending order of steps.

        Raises:
            ValueError: No source has a weight in a phase, or a source has two weights from the same step on.
        """
        if isinstance(self.train, str):
            return [(0, {"train": 1.0})]
        names = self.places("train")
        changes: dict[tuple[str, int], float] = {}
        for entry in self.train:
            if (entry.source, entry.from_step) in changes:
                raise ValueError(f"train: the source '{entry.source}' has two weights from step {entry.from_step} on")
            changes[entry.source, entry.from_step] = entry.weight
        steps = sorted({0, *(step for _, step in changes)})
        weights = dict.fromkeys(names, 0.0)
        found = []
        for step in steps:
            weights |= {name: weight for (name, at), weight in changes.items() if at == step}
            if not any(weights.values()):
                raise ValueError(f"train: from step {step} on no source has a weight")
            found.append((step, dict(weights)))
        return found


class StreamingConfig(Section):
    """How the data is read. These keys do not change what is trained."""

    verify: Literal["auto", "always", "never"] = "auto"
    """Whether to hash every local shard at the start; auto: up to 4 GB in total. Otherwise only sizes are compared.
    Fetched shards are always hashed on arrival, and again when they are read from the cache, except with never."""

    log_samples: bool = False
    """Whether the samples of each step are recorded in samples.jsonl."""

    prefetch: Annotated[int, Ge(1)] = 2
    """Number of steps whose batches a background thread prepares ahead."""

    threads: Annotated[int, Ge(1)] | None = None
    """Threads of each rank that decode and augment images; null: one per core of the rank, at most 16, and only one if
    images have fewer than 128 x 128 pixels."""

    cache: Annotated[Bytes, Field(ge=1)] = 20 * 10**9
    """Maximum size of fetched shards on this machine's disk ("20 GB"), over all ranks and runs."""

    cache_dir: str | None = None
    """Directory of the cache, on a local disk; null: BIGTRAIN_CACHE, else ~/.cache/bigtrain."""

    timeout: Annotated[float, BeforeValidator(_seconds), NUMBER_OR_TEXT, Field(gt=0)] = 20.0
    """Time without data from a server, in seconds or as "20 s", after which a request is aborted and retried."""

    retries: Annotated[int, Ge(0)] = 8
    """Number of retries of a fetch that receives no data; any received byte resets the count. Waits grow to 30 s."""
