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
    """The result; None if no token or sample counts."""
    unit: str = ""


@dataclass(frozen=True)
class HeldOut:
    """The sums over all ranks that an evaluator receives, for one held-out set or for all sets together."""

    totals: Totals
    """Loss, weight, and the metrics that were recorded."""
    text_bytes: float = 0.0
    """Bytes of the text whose tokens count; NaN for other data."""
    loss_unit: str = ""
    """Unit of the loss, from the model's `metric_units`."""


@dataclass(frozen=True)
class PassContext:
    """The parts of the run that an evaluator's own pass may use."""

    engine: Engine
    context: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences of one micro-batch on one rank."""
    multiple: int
    """The number of micro-batches of a rank must be a multiple of this."""
    load_tokenizer: Callable[[], Tokenizer]
    """Loads the tokenizer of the training data."""


OwnPass = Callable[[], dict[str, Result]]
"""Returns results by name, without the prefix `val_`. Collective; the results are equal on all ranks."""


class EvaluatorConfig(Section):
    """Base class of evaluators. A subclass has a `name`, and overrides the methods that it needs."""

    wants: ClassVar[frozenset[str]] = frozenset()
    """Metrics that the model records only on request (`bigtrain.metrics.wants_metric`)."""

    name: str
    """Name of the evaluator: of a file in bigtrain/training/evaluators, or of a plugin's class."""

    def measure(self, model: Any, batch: dict[str, Tensor]) -> None:
        """Record metrics of one micro-batch with `record_metric`.

        Only called if a subclass overrides it. Such an evaluator cannot run with pipeline stages.

        Args:
            model: The full model as the engine holds it, in a context without gradients.
            batch: The arrays of the micro-batch, on the device.
        """

    def results(self, held_out: HeldOut) -> dict[str, Result]:
        """Results by name, without the prefix `val_`. Recorded metrics are always reported and need not be repeated."""
        return {}

    def own_pass(self, context: PassContext) -> OwnPass | None:
        """A pass over the evaluator's own data, which runs at each evaluation after the held-out sets; or None.

        Called once, on every rank. If an evaluator has such a pass, the run is evaluated even without
        `data.validation`.
        """
        return None

    def check(self, data: ShardIndex) -> None:
        """Refuse data that this evaluator cannot run on, before any process is started.

        Args:
            data: One of the sources of the training data.

        Raises:
            UserError: The data does not fit the evaluator.
        """


EVALUATORS = Registry(
    "evaluator", EvaluatorConfig, package="bigtrain.training.evaluators", where="evaluation.evaluators"
)


class CallbackConfig(Section):
    """Base class of the config sections of callbacks; a subclass adds its keys and `build`."""

    name: str
    """Name of the callback: of a file in bigtrain/training/callbacks, or of a plugin's class."""

    def check(self, engine: EngineConfig) -> None:
        """Refuse an engine that the callback does not work with, before any process is started.

        Raises:
            UserError: The callback does not work with this engine.
        """

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a model that the callback does not work with, before any process is started.

        Raises:
            UserError: The callback does not work with this model.
        """

    def build(self, context: CallbackContext) -> Callback:
        """Build this rank's callback; called on every rank."""
        raise NotImplementedError


CALLBACKS = Registry("callback", CallbackConfig, package="bigtrain.training.callbacks", where="callbacks")


class EvaluationConfig(Section):
    """When and how the run is evaluated on held-out data."""

    evaluators: tuple[Annotated[EvaluatorConfig, EVALUATORS], ...] = Field(
        default_factory=lambda: (EVALUATORS["loss"].model_validate({"name": "loss"}),)
    )
    """The evaluators, which share one pass over the held-out data: [{name: loss}, {name: accuracy}]."""

    every: Duration = Duration.steps(250)
    """Interval between evaluations, in steps, tokens or epochs; the last step is always evaluated."""

    batches: Annotated[Count, Ge(1)] = 20
    """Number of global batches in each evaluation, the same ones every time; at most all validation data."""

    sequences: Annotated[Count, Ge(1)] | None = None
    """Number of sequences in each evaluation, instead of `batches`: runs of different batch sizes can be compared."""

    @field_validator("every")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        if value.is_time or value.value <= 0:
            raise ValueError(f"'{value}' is not an interval between evaluations: use steps, tokens or epochs")
        return value


NewRows = Literal["mean", "seed"]
"""How vocabulary rows that a source lacks are initialized."""


class InitConfig(Section):
    """Where the state before the first step comes from."""

    source: str | None = None
    """A checkpoint as RUN@STEP, or RUN for the newest one; or a directory of Hugging Face weights (config.json and
    safetensors). RUN is a name, a path, a URL of a store (s3://bucket/prefix/NAME), or the output directory of
    `checkpoint import`. null: all parameters are initialized from the seed."""

    hash: str | None = None
    """Hash of that checkpoint's manifest, or of the weights. A run writes it into its resolved config, and refuses a
    source with another hash."""

    state: Literal["weights", "weights+optimizer", "all"] = "weights"
    """What is loaded from the source. With all, this includes the step and the position in the data: the run is a
    branch of the source's run."""

    fresh: tuple[str, ...] = ()
    """Shell patterns over qualified names ("head.*"). Matching parameters are initialized from the seed; only with
    state: weights."""

    new_rows: NewRows | None = None
    """Accept weights with a vocabulary of another size. Each token keeps the row of its id, and surplus rows are
    dropped. Missing rows are the mean of the source's rows (mean) or initialized from the seed (seed). null: refuse."""

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

    If the loss or the gradient is not finite on any rank, the step updates nothing and is counted as bad; the run goes
    on with the next batch. A roll-back resumes from an older checkpoint and skips the batches that led to the bad step
    (Chowdhery et al. 2022, section 5.1).
    """

    limit: Annotated[Count, Ge(1)] = 10
    """Number of bad steps in a row that triggers `then`. FP16 overflows do not count while the loss scale can still be
    halved."""

    then: Literal["roll_back", "stop"] = "roll_back"
    """What the run does after `limit` bad steps in a row."""

    spike: Annotated[float, Gt(0)] | None = None
    """Roll back if a step's loss is more than this many standard deviations above the running mean of the losses before
    it; null: do not check for spikes."""

    window: Annotated[Count, Ge(2)] = 100
    """Number of steps over which the running mean and deviation are taken; spikes are detected after so many steps."""

    rewind: Annotated[Count, Ge(0)] = 100
    """A roll-back restores the newest checkpoint that is at least this many steps older than the bad step; if there is
    none, the newest one before the bad steps."""

    skip: Annotated[Count, Ge(0)] = 100
    """Number of batches after the bad step's batch that a roll-back skips as well."""

    max_roll_backs: Annotated[Count, Ge(0)] = 3
    """Maximum number of roll-backs in a run; when one more is due, the run ends with an error."""
