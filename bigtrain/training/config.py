"""The `evaluation`, `init` and `bad_steps` sections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt
from pydantic import Field, field_validator, model_validator

from bigtrain.config import Count, Duration, Registry, Section

if TYPE_CHECKING:
    from torch import Tensor

    from bigtrain.data.index import ShardIndex
    from bigtrain.data.tokenizers import Tokenizer
    from bigtrain.engines.config import EngineConfig
    from bigtrain.engines.contract import Engine, Totals
    from bigtrain.models.config import ModelConfig
    from bigtrain.training.callback import Callback, CallbackContext


@dataclass(frozen=True)
class Result:
    """One result of an evaluator."""

    value: float | None
    """None where nothing counts."""
    unit: str = ""


@dataclass(frozen=True)
class HeldOut:
    """What an evaluator sees of one held-out set, or of all together; sums over all ranks."""

    totals: Totals
    """Loss, weight, and what was recorded by name."""
    text_bytes: float = 0.0
    """Bytes of the text whose tokens count; NaN for other data."""


@dataclass(frozen=True)
class PassContext:
    """What an evaluator's own pass may use of the run."""

    engine: Engine
    context: int
    """Tokens of a sequence."""
    batch_size: int
    """Sequences of one pass on one rank."""
    multiple: int
    """The number of a rank's passes must be a multiple of this."""
    load_tokenizer: Callable[[], Tokenizer]
    """The tokenizer of the training data."""


OwnPass = Callable[[], dict[str, Result]]
"""Results by name, without the prefix `val_`. Collective; equal on all ranks."""


class EvaluatorConfig(Section):
    """Base of the evaluators. A subclass has a `name`, and overrides what it needs of the following."""

    wants: ClassVar[frozenset[str]] = frozenset()
    """Metrics that the model records only where they are requested (`bigtrain.metrics.wants_metric`)."""

    name: str
    """Which evaluator: a file of bigtrain/training/evaluators, or the name of a plugin's class."""

    def measure(self, model: Any, batch: dict[str, Tensor]) -> None:
        """Call `record_metric` for one micro-batch; only where overridden, and not with pipeline stages.

        Args:
            model: The whole model as the engine holds it, without gradients.
            batch: Its arrays on the device.
        """

    def results(self, held_out: HeldOut) -> dict[str, Result]:
        """Results by name, without the prefix `val_`; recorded metrics are reported without it."""
        return {}

    def own_pass(self, context: PassContext) -> OwnPass | None:
        """What runs at each evaluation after the held-out sets, on data of the evaluator's own; None: nothing.

        Called once, on every rank. A run whose evaluators have one is evaluated without `data.validation` too.
        """
        return None

    def check(self, data: ShardIndex) -> None:
        """Refuse, before a process is started, what this evaluator cannot run on.

        Args:
            data: One of the sources of the training data.

        Raises:
            UserError: What does not fit, and what would.
        """


EVALUATORS = Registry(
    "evaluator", EvaluatorConfig, package="bigtrain.training.evaluators", where="evaluation.evaluators"
)


class CallbackConfig(Section):
    """What all callbacks share; a callback adds its keys and `build`."""

    name: str
    """Which callback: a file of bigtrain/training/callbacks, or the name of a plugin's class."""

    def check(self, engine: EngineConfig) -> None:
        """Refuse an engine that the callback does not work with, before any process is started.

        Raises:
            UserError: It does not.
        """

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a model that the callback does not work with, before any process is started.

        Raises:
            UserError: It does not.
        """

    def build(self, context: CallbackContext) -> Callback:
        """The callback of this rank; every rank builds it."""
        raise NotImplementedError


CALLBACKS = Registry("callback", CallbackConfig, package="bigtrain.training.callbacks", where="callbacks")


class EvaluationConfig(Section):
    """When the run is evaluated on held-out data, by what, and on how much."""

    evaluators: tuple[Annotated[EvaluatorConfig, EVALUATORS], ...] = Field(
        default_factory=lambda: (EVALUATORS["loss"].model_validate({"name": "loss"}),)
    )
    """What is measured, in one pass over the data: [{name: loss}, {name: accuracy}]."""

    every: Duration = Duration.steps(250)
    """Training between evaluations, in steps, tokens or epochs; the last step is always evaluated."""

    batches: Annotated[Count, Ge(1)] = 20
    """Global batches of each evaluation, the same ones every time; at most the whole of the validation data."""

    sequences: Annotated[Count, Ge(1)] | None = None
    """Sequences of each evaluation, in place of `batches`: runs of different batch sizes are held against the same."""

    @field_validator("every")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        if value.is_time or value.value <= 0:
            raise ValueError(f"'{value}' is no interval between evaluations: use steps, tokens or epochs")
        return value


NewRows = Literal["mean", "seed"]
"""How rows of the vocabulary begin that a source lacks."""


class InitConfig(Section):
    """Where the state before the first step comes from."""

    source: str | None = None
    """RUN@STEP, or RUN for its newest checkpoint, by name, path or URL of a store (s3://bucket/prefix/NAME@STEP), also
    of what `checkpoint import` wrote; or a directory of Hugging Face weights (config.json and safetensors); null:
    initialized from the seed."""

    hash: str | None = None
    """Hash of that checkpoint's manifest, or of the weights; a run writes it into its resolved config, and holds to
    it."""

    state: Literal["weights", "weights+optimizer", "all"] = "weights"
    """What is taken: all means the step and the position in the data too, so that the run is a branch of the other."""

    fresh: tuple[str, ...] = ()
    """Shell patterns over qualified names ("head.*"): parameters that are initialized from the seed instead; with
    state: weights."""

    new_rows: NewRows | None = None
    """Take weights of a vocabulary of another size: a token keeps the row of its id, rows beyond are dropped, and
    those that are missing are the mean of the source's (mean) or initialized from the seed (seed); null: refused."""

    @model_validator(mode="after")
    def _fresh_goes_with_weights(self) -> InitConfig:
        if self.fresh and self.state != "weights":
            raise ValueError("fresh parameters have no optimizer state to take: set state to weights")
        if self.new_rows and self.state != "weights":
            raise ValueError("new rows have no optimizer state to take: set state to weights, or remove new_rows")
        if self.fresh and self.source is None:
            raise ValueError("without a source all parameters are initialized from the seed: remove fresh")
        return self


class BadStepsConfig(Section):
    """What a run does about steps whose loss or gradient is not finite, or whose loss jumps.

    A step whose loss or gradient is not finite on any rank updates nothing and is counted; the run goes on with the
    next batch. A roll-back resumes from an older checkpoint and skips the batches that led to the bad step (Chowdhery
    et al. 2022, section 5.1).
    """

    limit: Annotated[Count, Ge(1)] = 10
    """Bad steps in a row that are too many. FP16's overflows do not count while the loss scale can still be halved."""

    then: Literal["roll_back", "stop"] = "roll_back"
    """What the run does after too many."""

    spike: Annotated[float, Gt(0)] | None = None
    """Roll back from a step whose loss lies by more than this many standard deviations above the mean of those before
    it; null: losses are not looked at."""

    window: Annotated[Count, Ge(2)] = 100
    """Steps over which that mean and deviation run; so many pass before the first spike is seen."""

    rewind: Annotated[Count, Ge(0)] = 100
    """A roll-back goes to the newest checkpoint that is older than the bad step by at least this many steps; where
    there is none, to the newest before the bad steps."""

    skip: Annotated[Count, Ge(0)] = 100
    """Batches that are skipped after those up to the bad step."""

    max_roll_backs: Annotated[Count, Ge(0)] = 3
    """Roll-backs of a run; the next one ends it."""
