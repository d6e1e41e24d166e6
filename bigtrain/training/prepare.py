"""Combines a config with its data: lengths in steps, vocabulary, identity, and all checks that need no hardware.

This module does not import torch, so the command that starts a run refuses mistakes before it starts any process.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.checkpoint.restore import check_store
from bigtrain.config import CorruptionError, Duration, UserError
from bigtrain.config.urls import is_url
from bigtrain.data.augmenter import with_augmented_size
from bigtrain.data.encoding.files import FILE_NAME as TOKENIZER_NAME
from bigtrain.data.index import ShardIndex
from bigtrain.data.order.mixture import MixedOrder, Sources
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.streaming.store import check_remote, open_index, shards_at_once
from bigtrain.data.tokenizers import same_encoding
from bigtrain.engines.passthrough import check_passthrough_apart
from bigtrain.engines.support import check_support
from bigtrain.optim.check import check_zero_state
from bigtrain.optim.schedule import Schedule
from bigtrain.run import RunConfig, identity, recipe_of
from bigtrain.storage.objects import RemoteError
from bigtrain.training.boundaries import Boundaries

if TYPE_CHECKING:
    from bigtrain.engines.contract import Engine
from bigtrain.training.config import EvaluatorConfig, PassContext


@dataclass(frozen=True)
class Prepared:
    """A config together with its data."""

    config: RunConfig
    sources: Sources
    """The sources of the training data."""
    held_out: Sources | None
    batch_sequences: int
    total_steps: int
    sequences_per_epoch: int
    """Number of sequences in one epoch over all sources together."""
    schedule: Schedule

    @property
    def train(self) -> ShardIndex:
        """The first source; all sources hold the same kind of data and have the same tokenizer."""
        return self.sources.first

    @property
    def context(self) -> int:
        """Positions per sample: the tokens of a sequence or caption; 1 for an image or arrays."""
        return self.config.model.context if self.train.of_tokens else 1

    @property
    def outputs(self) -> int:
        """Size of the vocabulary, or number of classes of the labels; 0 if there is neither."""
        return self.sources.vocab_size

    @property
    def what(self) -> dict[str, Any]:
        """The recipe: what the run trains, with the data named by fingerprints."""
        data = {"train": self._mixture(), "validation": None}
        if self.held_out is not None:
            found = [index.fingerprint for index in self.held_out.indexes]
            data["validation"] = found[0] if len(found) == 1 else found
        return recipe_of(self.config, data, self.batch_sequences)

    def _mixture(self) -> Any:
        """The fingerprint of the data; for a mixture, the sources' fingerprints with their weights, by phase."""
        by_name = self.fingerprints
        if not self.is_mixture:
            return next(iter(by_name.values()))
        return {
            f"from step {step}": {
                by_name[name]: round(weight / sum(weights.values()), 12) for name, weight in weights.items()
            }
            for step, weights in self.config.data.phases()
        }

    @property
    def is_mixture(self) -> bool:
        """Whether the training data has several sources."""
        return len(self.sources.names) > 1

    @property
    def is_evaluated(self) -> bool:
        """Whether the run has held-out data, or evaluators with data of their own."""
        return self.held_out is not None or any(map(_has_own_pass, self.config.evaluation.evaluators))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the sources by name."""
        return {name: index.fingerprint for name, index in zip(self.sources.names, self.sources.indexes, strict=True)}

    @property
    def identity(self) -> str:
        """Hash of the recipe."""
        return identity(self.what)

    def steps(self, duration: Duration) -> int:
        """A duration of training in steps, at least 1."""
        per_step = self.batch_sequences * self.context
        return max(1, duration.in_steps(per_step, self.batch_sequences, self.sequences_per_epoch))

    @cached_property
    def order(self) -> SampleOrder | MixedOrder:
        """The global order of the training data."""
        config, consumed = self.config, self.config.data.consumed
        orders = [
            SampleOrder(config.seed, index.fingerprint, self._counts(index), config.data.shuffle_window)
            for index in self.sources.indexes
        ]
        if len(orders) == 1 and consumed is None:
            return orders[0]
        first = 0 if consumed is None else consumed.step
        by_step: dict[int, list[float]] = {}
        for step, weights in config.data.phases():
            by_step[max(step, first)] = [weights[name] for name in self.sources.names]
        phases = [(step * self.batch_sequences, weights) for step, weights in by_step.items()]
        before = {} if consumed is None else consumed.drawn
        return MixedOrder(orders, phases, [before.get(index.fingerprint, 0) for index in self.sources.indexes])

    def epochs(self, step: int) -> dict[str, float]:
        """The number of epochs of each source, by name, that `step` global batches consume."""
        consumed = self.order.drawn(step * self.batch_sequences).tolist()
        sizes = [sum(self._counts(index)) for index in self.sources.indexes]
        return {name: one / size for name, one, size in zip(self.sources.names, consumed, sizes, strict=True)}

    def _counts(self, index: ShardIndex) -> list[int]:
        """Number of sequences in each shard."""
        return index.sequence_counts(self.context, self.config.data.document_mask)

    def warnings(self) -> list[str]:
        """Warnings about what is probably not intended: empty classes, samples that are cut, weights of
        another tokenizer."""
        found = []
        for name, index in zip(self.sources.names, self.sources.indexes, strict=True):
            if index.origin is not None:
                continue  # The sidecars of a remote directory have not been fetched yet.
            if empty := index.empty_classes():
                more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
                found.append(f"no sample of '{name}' has the class {', '.join(empty[:5])}{more}")
            if cut := index.sample_kind.cut(index, self.context):
                found.append(
                    f"{cut} of {index.samples} {index.sample_kind.unit} of '{name}' are longer than model.context "
                    f"{self.context} and are cut"
                )
        return found + self._other_tokenizer()

    def _other_tokenizer(self) -> list[str]:
        """A warning if the Hugging Face weights from which the run starts have another tokenizer than the data."""
        places = (self.config.init.source, getattr(self.config.model, "hf", None))
        info = self.train.tokenizer
        for place in places:
            path = Path(place) / TOKENIZER_NAME if place and not is_url(place) else None
            if path is None or not path.is_file() or info is None or info.kind == "unknown":
                continue
            if not same_encoding(self.train.load_tokenizer(), path):
                return [f"the data has another tokenizer than the {TOKENIZER_NAME} beside the weights"]
        return []

    def boundaries(self) -> Boundaries:
        """The steps after which the run evaluates or saves."""
        save, keep = self.config.checkpoint.every, self.config.checkpoint.permanent
        return Boundaries(
            total_steps=self.total_steps,
            evaluate_every=self.steps(self.config.evaluation.every) if self.is_evaluated else None,
            save_every=None if save.is_time else self.steps(save),
            keep_every=None if keep is None else self.steps(keep),
            keep_at=frozenset(self.steps(one) for one in self.config.checkpoint.at),
        )


def prepare(config: RunConfig, verify: bool = True, pinned: Mapping[str, Any] | None = None) -> Prepared:
    """Open the data of a config, and check that config and data fit together.

    Args:
        verify: Whether to compare the shards with their index (`streaming.verify`), check what the engine's library
            supports, and test the store of checkpoints. A rank skips this, since the command that started it has
            done it.
        pinned: The part `data` of the run's recipe; streamed data must have a fingerprint that it names.

    Raises:
        UserError: Shards are missing, changed or out of reach; the model does not support them; lengths do not fit; or
            the store of checkpoints cannot be written.
    """
    sources = _open("train", config, verify, pinned)
    held_out = _open("validation", config, verify, pinned) if config.data.validation else None
    train = sources.first
    _check_fit(config, sources, held_out)
    if verify:
        config.model.check_source(sources.vocab_size)
        check_passthrough_apart(config.engine, config.precision, pipelined=config.layout.pp > 1)
        check_store(config)
    context = config.model.context if train.of_tokens else 1
    try:
        batch = config.batch.size.sequences(context)
    except ValueError as error:
        raise UserError(
            f"batch.size: {error}", fix="Give a number of sequences, or a multiple of model.context."
        ) from None
    if verify:
        for several, window in ((sources, config.data.shuffle_window), (held_out, 1)):
            if several is not None:
                _check_bytes(several, config, context, window, batch)
    per_epoch = sum(sources.sequence_counts(context, config.data.document_mask))
    try:
        total = config.duration.in_steps(batch * context, batch, per_epoch)
    except ValueError as error:
        raise UserError(f"duration: {error}") from None
    if total < 1:
        raise UserError(f"duration: '{config.duration}' is less than one step")

    def to_steps(duration: Duration) -> int:
        return duration.in_steps(batch * context, batch, per_epoch)

    schedule = config.optimizer.schedule_of(config.schedule, total, to_steps)
    return Prepared(config, sources, held_out, batch, total, per_epoch, schedule)


def check_engine(config: RunConfig) -> None:
    """Refuse what the engine of a config does not support; see `engines.support.check_support`."""
    check_support(
        config.engine,
        config.model.arch,
        config.layout,
        document_mask=config.data.document_mask,
        optimizer=config.optimizer,
        precision=config.precision,
        frozen=config.model.frozen,
    )


def loader_options(config: RunConfig, engine: Engine, batch_sequences: int, context: int) -> dict[str, Any]:
    """Arguments of the loaders with which a rank reads its part of each global batch.

    Args:
        batch_sequences: Sequences per global batch.
        context: Positions per sample; see `Prepared.context`.
    """
    return {
        "batch_size": batch_sequences,
        "context": context,
        "dp_rank": engine.data_parallel_rank,
        "dp_size": engine.data_parallel_size,
        "micro_size": config.layout.micro_size,
        "least_micro_batches": config.layout.least_micro_batches,
        "micro_batch_multiple": config.layout.micro_batch_multiple,
        "seed": config.seed,
        "document_mask": config.data.document_mask,
        "prefetch": config.streaming.prefetch,
        "streaming": config.streaming,
        "augment": config.data.augment,
    }


def pass_context(config: RunConfig, engine: Engine, batch_sequences: int, index: ShardIndex) -> PassContext:
    """The context that the evaluators' own passes use.

    Args:
        batch_sequences: Sequences per global batch.
        index: The index whose tokenizer encodes the evaluators' texts.
    """
    layout = config.layout
    return PassContext(
        engine,
        config.model.context,
        batch_size=layout.micro_size or -(-batch_sequences // engine.data_parallel_size),
        multiple=math.lcm(layout.least_micro_batches, layout.micro_batch_multiple),
        load_tokenizer=index.load_tokenizer,
    )


def pins(data: Mapping[str, Any], key: str) -> list[str]:
    """The fingerprints that a recipe's part `data` names under `train` or `validation`."""
    value = data[key]
    if isinstance(value, Mapping):
        return sorted({fingerprint for weights in value.values() for fingerprint in weights})
    return list(value) if isinstance(value, list) else [value]


def _open(key: str, config: RunConfig, first: bool, pinned: Mapping[str, Any] | None) -> Sources:
    streaming = config.streaming
    if first:
        # A user waits for the answer, so an unreachable server is retried less often than during training.
        streaming = streaming.model_copy(update={"retries": min(2, streaming.retries)})
    places = config.data.places(key)
    try:
        found = {
            name: open_index(place, streaming, None if pinned is None else pins(pinned, key))
            for name, place in places.items()
        }
    except (RemoteError, CorruptionError) as error:
        if not first:
            raise
        raise UserError(f"data.{key}: {error.what}", error.where, error.fix) from None
    sources = Sources.by_content(found)
    sources.require_same_samples()
    return sources


def _check_bytes(sources: Sources, config: RunConfig, context: int, window: int, batch: int) -> None:
    streaming, mask = config.streaming, config.data.document_mask
    try:
        held = []
        for index in sources.indexes:
            if index.origin is None:
                index.check(streaming.verify)
            held.append((index, shards_at_once(index.sequence_counts(context, mask), window, batch)))
        check_remote(held, streaming)
    except (RemoteError, CorruptionError) as error:
        # Nothing has run yet, and the user can fix it.
        raise UserError(error.what, error.where, error.fix) from None


def _check_fit(config: RunConfig, sources: Sources, held_out: Sources | None) -> None:
    model, train = config.model, sources.first
    if model.data_kind not in (train.kind, train.sample_kind.gives):
        raise UserError(
            f"data.train holds {train.kind}, but a model of arch '{model.arch}' takes {model.data_kind}",
            train.place,
            "Choose another model.arch, or other shards.",
        )
    if config.data.document_mask and not model.takes_documents:
        raise UserError(
            f"data.document_mask is on, but a model of arch '{model.arch}' does not support it",
            fix="Turn it off, or choose an arch that does, such as llama.",
        )
    if model.begins_from_weights and config.init.source is None:
        raise UserError(
            f"A model of arch '{model.arch}' needs initial weights to compare with, but init.source is not set",
            "init.source",
            "Name a run's checkpoint, or a directory of Hugging Face weights.",
        )
    train.sample_kind.check_model(with_augmented_size(config.data.augment, train), model)
    for index in held_out.indexes if held_out else ():
        train.require_same_tokens(index)
        if index.vocab_size > sources.vocab_size:
            # This happens only with tokens made by other tools, whose vocabulary size is known by the largest id alone.
            raise UserError(
                f"the held-out data has token ids up to {index.vocab_size - 1}, but the training data only up to "
                f"{sources.vocab_size - 1}",
                index.place,
                "Index both with the tokenizer that made the tokens: bigtrain data index DIR --tokenizer TOKENIZER",
            )
    check_engine(config)
    if model.follows_mup:
        config.optimizer.check_mup()
    for optimizer in (config.optimizer, *map(config.optimizer.of_part, config.optimizer.parts)):
        if optimizer.plugin is not None:
            check_zero_state(optimizer)
    for callback in config.callbacks:
        callback.check(config.engine)
        callback.check_model(model)
    evaluators = config.evaluation.evaluators
    if held_out is not None or any(map(_has_own_pass, evaluators)):
        _check_evaluators(evaluators, config.layout.pp, train)
    elif config.checkpoint.best is not None:
        raise UserError(
            "The best checkpoint is chosen by an evaluation, but this run has none",
            "checkpoint.best",
            "Set data.validation, or remove checkpoint.best.",
        )
    try:
        config.layout.check(model, sources.vocab_size)
    except ValueError as error:
        raise UserError(str(error), fix="Change 'layout'.") from None


def _has_own_pass(evaluator: EvaluatorConfig) -> bool:
    return type(evaluator).own_pass is not EvaluatorConfig.own_pass


def _check_evaluators(evaluators: Sequence[EvaluatorConfig], stages: int, train: ShardIndex) -> None:
    for evaluator in evaluators:
        evaluator.check(train)
        if stages > 1 and type(evaluator).measure is not EvaluatorConfig.measure:
            raise UserError(
                f"The evaluator '{evaluator.name}' needs the full model on one rank, but layout.pp is {stages}",
                "evaluation.evaluators",
                "Remove it, set layout.pp to 1, or let the model record the metric (bigtrain/training/README.md).",
            )
