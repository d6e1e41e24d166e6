"""The config of a run: the sections of all rooms under their keys."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Lt
from pydantic import StringConstraints, field_validator

from bigtrain.checkpoint.config import CheckpointConfig
from bigtrain.config import BatchSize, Duration, Section
from bigtrain.data.config import DataConfig, StreamingConfig
from bigtrain.engines.config import ENGINES, EngineConfig, Precision
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.jobs.config import JobConfig
from bigtrain.models.config import FAMILIES, ModelConfig
from bigtrain.optim.config import OPTIMIZERS, SCHEDULES, OptimizerConfig, ScheduleConfig
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.optim.schedules.constant import ConstantConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.run.names import NAME_PATTERN
from bigtrain.tracking.config import TrackingConfig
from bigtrain.training.config import CALLBACKS, BadStepsConfig, CallbackConfig, EvaluationConfig, InitConfig


class BatchConfig(Section):
    """The global batch: what one optimizer step consumes, over all ranks together."""

    size: BatchSize
    """A number of sequences (12) or of tokens ("512k tokens")."""


class RunConfig(Section):
    """One run: `name`, the keys of the recipe (`bigtrain.run.recipe.RECIPE`), then those of the execution."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the run: its directory, and its name in the tracker."""

    seed: Annotated[int, Ge(-(2**63)), Lt(2**64)] = 1337
    """The only source of randomness: initial weights, order of the samples, dropout."""

    model: Annotated[ModelConfig, FAMILIES]
    """The architecture and its sizes, or `preset: NAME` with keys that override it."""

    data: DataConfig
    """The shards to train and to validate on."""

    batch: BatchConfig
    """Size of the global batch."""

    duration: Duration
    """Length of the training: "2000 steps", "1e9 tokens" or "3 epochs"."""

    optimizer: Annotated[OptimizerConfig, OPTIMIZERS] = AdamWConfig()
    """How gradients become updates."""

    schedule: Annotated[ScheduleConfig, SCHEDULES] = ConstantConfig()
    """How the learning rate changes over the run."""

    precision: Precision = "bf16"
    """Arithmetic of matmuls and residual stream: bf16, fp32, or fp16 with loss scaling."""

    init: InitConfig = InitConfig()
    """Where the state before the first step comes from."""

    streaming: StreamingConfig = StreamingConfig()
    """How shards are read."""

    engine: Annotated[EngineConfig, ENGINES] = FSDPConfig()
    """Who executes a step."""

    layout: LayoutConfig = LayoutConfig()
    """How model and batch lie on the ranks."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run saves itself, and what it keeps."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """When the run is evaluated on held-out data, and by what."""

    bad_steps: BadStepsConfig = BadStepsConfig()
    """The reaction to steps whose loss or gradient is not finite, or whose loss jumps."""

    callbacks: tuple[Annotated[CallbackConfig, CALLBACKS], ...] = ()
    """What sees the events of the training loop beside bigtrain's own: [{name: early_stop, patience: 5}]."""

    tracking: TrackingConfig = TrackingConfig()
    """Where metrics go."""

    job: JobConfig = JobConfig()
    """The number of processes, and the reaction when one dies."""

    @field_validator("duration")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        if value.is_time:
            raise ValueError(f"'{value}' is a time: give steps, tokens, samples or epochs")
        if value.value <= 0:
            raise ValueError(f"'{value}' is less than one step: give a length above zero")
        return value
