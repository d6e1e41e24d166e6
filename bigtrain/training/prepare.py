"""What a config means on its data: lengths in steps, the vocabulary, the identity; every check that needs no hardware.

Free of torch, so that the command that starts a run refuses a mistake before any process is spent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.config import CorruptionError, Duration, UserError
from bigtrain.data.index import ShardIndex, Verify, load_index
from bigtrain.data.order import SampleOrder
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

    def boundaries(self) -> Boundaries:
        """When to evaluate and when to save."""
        save = self.config.checkpoint.every
        return Boundaries(
            total_steps=self.total_steps,
            evaluate_every=self.steps(self.config.evaluation.every) if self.validation else None,
            save_every=None if save.is_time else self.steps(save),
        )


def prepare(config: RunConfig, verify: bool = True) -> Prepared:
    """Open the data of a config and check that both go together.

    Args:
        verify: Compare the shards with their index as `streaming.verify` says, and ask the engine's library what it
            takes; a rank does not, since the command that started it has.

    Raises:
        UserError: Shards missing or changed, a model that cannot take them, lengths that do not fit.
    """
    train = load_index(Path(config.data.train))
    validation = load_index(Path(config.data.validation)) if config.data.validation else None
    _check_fit(config, train, validation)
    if verify:
        config.model.check_source(train.vocab_size)
        check_passthrough_apart(config.engine, config.precision, pipelined=config.layout.pp > 1)
        for index in (train, validation):
            if index is not None:
                _check_bytes(index, config.streaming.verify)
    context = config.model.context if train.kind == "tokens" else 1
    try:
        batch = config.batch.size.sequences(context)
    except ValueError as error:
        raise UserError(
            f"batch.size: {error}", fix="Give a number of sequences, or a multiple of model.context."
        ) from None
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


def _check_bytes(index: ShardIndex, verify: Verify) -> None:
    try:
        index.check(verify)
    except CorruptionError as error:
        # Nothing has been spent yet, and it is the user who can mend it.
        raise UserError(error.what, error.where, error.fix) from None


def _check_fit(config: RunConfig, train: ShardIndex, validation: ShardIndex | None) -> None:
    model = config.model
    if train.kind != model.data_kind:
        raise UserError(
            f"data.train holds {train.kind}, and a model of arch '{model.arch}' takes {model.data_kind}",
            str(train.directory),
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
            str(train.directory),
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
