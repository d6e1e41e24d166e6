"""The config of a run: all sections under their keys."""

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
    """The global batch: the sequences that one optimizer step consumes over all ranks."""

    size: BatchSize
    """Size of the global batch, in sequences (12) or tokens ("512k tokens")."""


class RunConfig(Section):
    """The config of one run: its name, the keys of the recipe (`bigtrain.run.recipe.RECIPE`) and of the execution."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    """Name of the run, of its directory, and of the run in trackers."""

    seed: Annotated[int, Ge(-(2**63)), Lt(2**64)] = 1337
    """Seed of all randomness: initial weights, order of the samples, dropout."""

    model: Annotated[ModelConfig, FAMILIES]
    """The architecture and its sizes, or `preset: NAME` with keys that override the preset's."""

    data: DataConfig
    """The shards for training and validation."""

    batch: BatchConfig
    """Size of the global batch."""

    duration: Duration
    """Length of the training: "2000 steps", "1e9 tokens" or "3 epochs"."""

    optimizer: Annotated[OptimizerConfig, OPTIMIZERS] = AdamWConfig()
    """The optimizer and its hyperparameters."""

    schedule: Annotated[ScheduleConfig, SCHEDULES] = ConstantConfig()
    """The learning rate as a function of the step."""

    precision: Precision = "bf16"
    """Data type of the matmuls and the residual stream: bf16, fp32, or fp16 with loss scaling."""

    init: InitConfig = InitConfig()
    """Source of the state before the first step."""

    streaming: StreamingConfig = StreamingConfig()
    """How shards are fetched, verified and read."""

    engine: Annotated[EngineConfig, ENGINES] = FSDPConfig()
    """The engine that executes the steps, such as fsdp or deepspeed."""

    layout: LayoutConfig = LayoutConfig()
    """How the model and the batch are distributed over the ranks."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the run saves checkpoints, and which of them it keeps."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """When the run is evaluated on held-out data, and by which evaluators."""

    bad_steps: BadStepsConfig = BadStepsConfig()
    """The reaction to steps whose loss or gradient is not finite, or whose loss jumps."""

    callbacks: tuple[Annotated[CallbackConfig, CALLBACKS], ...] = ()
    """Callbacks of the training loop, in addition to bigtrain's default ones: [{name: early_stop, patience: 5}]."""

    tracking: TrackingConfig = TrackingConfig()
    """How often metrics are logged, and to which trackers."""

    job: JobConfig = JobConfig()
    """The number of processes, and the reaction when one of them fails."""

    @field_validator("duration")
    @classmethod
    def _is_a_length_of_training(cls, value: Duration) -> Duration:
        if value.is_time:
            raise ValueError(f"'{value}' is a time: give steps, tokens, samples or epochs")
        if value.value <= 0:
            raise ValueError(f"'{value}' is less than one step: give a length above zero")
        return value
