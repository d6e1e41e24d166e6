"""What a config means on its data: lengths in steps, the vocabulary, the identity; every check that needs no hardware.

Free of torch, so that the command that starts a run refuses a mistake before any process is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigtrain.config import CorruptionError, Duration, UserError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.index import ShardIndex
from bigtrain.data.order import SampleOrder
from bigtrain.data.remote import RemoteError
from bigtrain.data.streaming import check_remote, open_index, shards_at_once
from bigtrain.engines.passthrough import check_passthrough_apart
from bigtrain.engines.support import check_support
from bigtrain.optim.schedule import Schedule
from bigtrain.run import RunConfig, identity, what_is_trained
from bigtrain.training.boundaries import Boundaries


@dataclass(frozen=True)
class Prepared:
    """A config together with its data."""

    config: RunConfig
    train: ShardIndex
    validation: ShardIndex | None
    batch_sequences: int
    total_steps: int
    sequences_per_epoch: int
    schedule: Schedule

    @property
    def context(self) -> int:
        """Positions of one sample: tokens of a sequence, 1 for an image."""
        return self.config.model.context if self.train.kind == "tokens" else 1

    @property
    def outputs(self) -> int:
        """Entries of the vocabulary, or classes of the labels."""
        return self.train.vocab_size

    @property
    def what(self) -> dict[str, Any]:
        """What is trained, by content."""
        fingerprints = {
            "train": self.train.fingerprint,
            "validation": self.validation.fingerprint if self.validation else None,
        }
        return what_is_trained(self.config, fingerprints, self.batch_sequences)

    @property
    def identity(self) -> str:
        """Hash of what is trained."""
        return identity(self.what)

    def steps(self, duration: Duration) -> int:
        """A duration of training in steps, at least 1."""
        per_step = self.batch_sequences * self.context
        return max(1, duration.in_steps(per_step, self.batch_sequences, self.sequences_per_epoch))

    def order(self) -> SampleOrder:
        """The global order of the training data."""
        counts = self.train.sequence_counts(self.context)
        return SampleOrder(self.config.seed, self.train.fingerprint, counts, self.config.data.shuffle_window)

    @property
    def saved_at(self) -> frozenset[int]:
        """Steps whose checkpoints are asked for by name, and kept."""
        return frozenset(self.steps(one) for one in self.config.checkpoint.at)

    def boundaries(self) -> Boundaries:
        """When to evaluate and when to save."""
        save = self.config.checkpoint.every
        return Boundaries(
            total_steps=self.total_steps,
            evaluate_every=self.steps(self.config.evaluation.every) if self.validation else None,
            save_every=None if save.is_time else self.steps(save),
            save_at=self.saved_at,
        )


def prepare(config: RunConfig, verify: bool = True, pinned: Mapping[str, str | None] | None = None) -> Prepared:
    """Open the data of a config and check that both go together.

    Args:
        verify: Compare the shards with their index as `streaming.verify` says, and ask the engine's library what it
            takes; a rank does not, since the command that started it has.
        pinned: Fingerprints that streamed data must have, by the key under `data`.

    Raises:
        UserError: Shards missing, changed or out of reach, a model that cannot take them, lengths that do not fit.
    """
    train = _open("train", config.data.train, config, verify, pinned)
    validation = _open("validation", config.data.validation, config, verify, pinned) if config.data.validation else None
    _check_fit(config, train, validation)
    if verify:
        config.model.check_source(train.vocab_size)
        check_passthrough_apart(config.engine, config.precision, pipelined=config.layout.pp > 1)
    context = config.model.context if train.kind == "tokens" else 1
    try:
        batch = config.batch.size.sequences(context)
    except ValueError as error:
        raise UserError(
            f"batch.size: {error}", fix="Give a number of sequences, or a multiple of model.context."
        ) from None
    if verify:
        for index, window in ((train, config.data.shuffle_window), (validation, 1)):
            if index is not None:
                held = shards_at_once(index.sequence_counts(context), window, batch)
                _check_bytes(index, config.streaming, held)
    per_epoch = sum(train.sequence_counts(context))
    try:
        total = config.duration.in_steps(batch * context, batch, per_epoch)
    except ValueError as error:
        raise UserError(f"duration: {error}") from None
    if total < 1:
        raise UserError(f"duration: '{config.duration}' is less than one step")

    def to_steps(duration: Duration) -> int:
        return duration.in_steps(batch * context, batch, per_epoch)

    schedule = config.schedule.build(config.optimizer.lr, total, to_steps)
    return Prepared(config, train, validation, batch, total, per_epoch, schedule)


def _open(key: str, place: str, config: RunConfig, first: bool, pinned: Mapping[str, str | None] | None) -> ShardIndex:
    streaming = config.streaming
    if not first:
        return open_index(place, streaming, None if pinned is None else pinned[key])
    # A person waits for an answer: a server that is not there is not waited for as long as in training.
    hurried = streaming.model_copy(update={"retries": min(2, streaming.retries)})
    try:
        return open_index(place, hurried)
    except (RemoteError, CorruptionError) as error:
        raise UserError(f"data.{key}: {error.what}", error.where, error.fix) from None


def _check_bytes(index: ShardIndex, streaming: StreamingConfig, shards_held: int) -> None:
    try:
        if index.origin is None:
            index.check(streaming.verify)
        if index.streams:
            check_remote(index, streaming, shards_held)
    except (RemoteError, CorruptionError) as error:
        # Nothing has been spent yet, and it is the user who can mend it.
        raise UserError(error.what, error.where, error.fix) from None


def _check_fit(config: RunConfig, train: ShardIndex, validation: ShardIndex | None) -> None:
    model = config.model
    if train.kind != model.data_kind:
        raise UserError(
            f"data.train holds {train.kind}, and a model of arch '{model.arch}' takes {model.data_kind}",
            train.place,
            "Choose another model.arch, or other shards.",
        )
    if config.data.document_mask and not model.takes_documents:
        raise UserError(
            f"data.document_mask is on, and a model of arch '{model.arch}' does not heed it",
            fix="Turn it off, or choose an arch that does, such as llama.",
        )
    shape = train.image and (train.image.height, train.image.width, train.image.channels)
    if shape and model.sample_shape and shape != model.sample_shape:
        raise UserError(
            f"The images are {_by(shape)} (height, width, channels), and the model takes {_by(model.sample_shape)}",
            train.place,
            "Change the sizes under 'model'.",
        )
    if validation is not None:
        train.require_same_tokens(validation)
    check_support(
        config.engine, model.arch, config.layout, document_mask=config.data.document_mask, plain=model.is_plain
    )
    try:
        config.layout.check(model, train.vocab_size)
    except ValueError as error:
        raise UserError(str(error), fix="Change 'layout'.") from None


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
