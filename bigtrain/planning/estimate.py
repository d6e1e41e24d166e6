"""Estimates memory and time of one training step from a run's config, by term, before anything is started.

    job = Job.of(config, vocab_size)
    estimate = job.estimate(cluster("h100"), gpus=512)
    estimate.memory.total, estimate.seconds.total, estimate.mfu

The training code itself decides which part of the model and of the batch each rank gets: `LayoutConfig.split`,
`LayoutConfig.mesh`, `data.loader.distribute` and the tensor plan. The formulas for parameters, gradients and optimizer
state are in memory.py, those for collectives in communication.py and zero.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from bigtrain.config import UserError
from bigtrain.data.loader import distribute
from bigtrain.engines.config import EngineConfig, Precision
from bigtrain.engines.deepspeed.config import DeepSpeedConfig
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.hardware.cluster import Cluster
from bigtrain.models.chunks import chunk_tokens
from bigtrain.models.decoder_config import DecoderConfig
from bigtrain.parallel.config import LayoutConfig, Mesh
from bigtrain.planning.communication import Passes, Phase, Term, communication
from bigtrain.planning.memory import ADAM, Moments, block_activation_bytes, held_bytes, norm_bytes, passes_in_flight
from bigtrain.planning.parts import BYTES, FP32, Parts
from bigtrain.planning.peak import Buffers, Memory, Moment
from bigtrain.planning.step import StageWork, Step, StepSeconds
from bigtrain.planning.work import RankWork, Software, rank_works
from bigtrain.planning.zero import zero

REDUCE_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces in one bucket (`reduce_bucket_size`)."""
RUNTIME_BYTES = 1_500_000_000
"""Memory for CUDA's context, the communication library's buffers and the matmuls' workspaces."""


@dataclass(frozen=True)
class Estimate:
    """Memory and time of one execution of a run."""

    layout: LayoutConfig
    engine: EngineConfig
    sizes: Mesh
    passes: Passes
    memory: Memory
    """Memory of the pp rank that needs most."""
    place: int
    """Index of that rank on the pp axis."""
    limit_bytes: int
    """Usable memory of a device."""
    seconds: StepSeconds
    tokens: int
    """Tokens of the global batch."""
    mfu: float
    """Model FLOPs utilization, 0 to 1. Attention counts all pairs of tokens (Chowdhery et al. 2022, appendix B)."""
    mfu_causal: float
    """Model FLOPs utilization, 0 to 1. Attention counts the causal half of the pairs."""

    @property
    def fits(self) -> bool:
        """Whether the peak memory is at most the usable memory."""
        return self.memory.total <= self.limit_bytes

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all ranks together."""
        return self.tokens / self.seconds.total


@dataclass(frozen=True)
class Job:
    """The input of planning: the sizes of the recipe, and the engine and layout from which a search starts."""

    model: DecoderConfig
    vocab_size: int
    batch: int
    """Size of the global batch in sequences."""
    engine: EngineConfig
    layout: LayoutConfig
    precision: Precision = "bf16"
    documents: bool = False
    moments: Moments = ADAM
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any, vocab_size: int) -> Job:
        """The job of a run's config.

        Args:
            config: The run's `RunConfig`.

        Raises:
            UserError: The formulas do not cover the model or the engine.
        """
        model, engine = config.model, config.engine
        _check_covered(model)
        if not isinstance(engine, FSDPConfig | DeepSpeedConfig):
            raise UserError(
                f"The formulas do not cover the engine '{engine.name}'", "engine.name", "Plan with fsdp or deepspeed."
            )
        if isinstance(engine, DeepSpeedConfig) and engine.offload != "none":
            raise UserError(
                "The time of an optimizer on the host is not covered",
                "engine.offload",
                "Plan with engine.offload: none.",
            )
        batch = config.batch.size.sequences(model.context)
        documents = bool(config.data.document_mask)
        return cls(
            model,
            vocab_size,
            batch,
            engine,
            config.layout,
            config.precision,
            documents,
            moments_of(config.optimizer),
            (*config.optimizer.frozen, *model.frozen),
        )

    def check(self, gpus: int) -> Mesh:
        """Check the layout, and return its mesh on `gpus` GPUs.

        Raises:
            ValueError: The layout is not possible on that many GPUs, or for this model or batch.
        """
        sizes = self.layout.mesh(gpus)
        self.layout.check(self.model, self.vocab_size)
        if sizes.data_parallel > self.batch:
            raise ValueError(f"{sizes.data_parallel} data-parallel ranks share {self.batch} sequences of a batch")
        return sizes

    def passes(self, sizes: Mesh) -> Passes:
        """The micro-batches of one rank."""
        shared = distribute(
            self.batch,
            sizes.data_parallel,
            self.layout.micro_size or self.batch,
            least=self.layout.least_micro_batches,
            multiple=self.layout.micro_batch_multiple,
        )
        return Passes(shared.n_micro, shared.micro_batch, self.model.context)

    def estimate(self, on: Cluster, gpus: int) -> Estimate:
        """Estimate the memory and the step time of a layout on a number of GPUs.

        Raises:
            ValueError: The layout does not fit these GPUs, or the device does not support this precision.
        """
        sizes = self.check(gpus)
        passes = self.passes(sizes)
        memory, place = self.peak(sizes, passes, on)
        seconds = self.step(sizes, passes).seconds(on)
        tokens = self.batch * self.model.context
        flops = self.model.flops_per_token(self.vocab_size)
        peak = (on.device.peak(self.precision) or math.inf) * gpus
        rate = tokens / seconds.total / peak
        return Estimate(
            self.layout,
            self.engine,
            sizes,
            passes,
            memory,
            place,
            on.memory_bytes,
            seconds,
            tokens,
            flops.full * rate,
            flops.causal * rate,
        )

    def peak(self, sizes: Mesh, passes: Passes, on: Cluster) -> tuple[Memory, int]:
        """The memory of the pp rank that needs most, and its index on the pp axis."""
        found = [(self.memory(sizes, passes, place, on), place) for place in _telling_places(sizes.pp)]
        return max(found, key=lambda one: one[0].total)

    @cached_property
    def number(self) -> int:
        """Bytes per element of the matmuls' dtype."""
        return BYTES[self.precision]

    def memory(self, sizes: Mesh, passes: Passes, place: int, on: Cluster) -> Memory:
        """Peak memory of the rank with coordinate `place` on the pp axis, and 0 on all other axes."""
        rank = place * (sizes.world_size // sizes.pp)
        on_cpu = "fp32" in on.device.peak_flops and on.processors == 1
        held = held_bytes(
            self.model,
            self.vocab_size,
            engine=self.engine,
            sizes=sizes,
            layout=self.layout,
            rank=rank,
            precision=self.precision,
            moments=self.moments,
            frozen=self.frozen,
        )
        parts = _parts(self, sizes, rank)
        stages = parts.stages
        blocks = sum(len(stage.blocks) for stage in stages)
        flight = passes_in_flight(self.layout, place, passes.count)
        recompute = getattr(self.engine, "recompute", "none")
        kept = self._block_bytes(passes, recompute, on_cpu)
        whole = self._block_bytes(passes, "none", on_cpu) if recompute != "none" else 0
        buffers = self._buffers(parts, sizes)
        tokens = passes.tokens // sizes.cp
        stream = tokens * self.model.width * self.number
        # The input of a later stage is kept in its receive buffer, which counts as messages.
        entered = stream * flight if stages[0].is_first else 0
        activations = kept * blocks * flight // self.layout.pp_stages_per_rank + entered
        working = whole + self.number * tokens * (3 * self.model.hidden_width // sizes.tp) + 4 * stream
        moments = [
            Moment(buffers.whole + buffers.block, activations, max(working, buffers.added)),
            Moment(buffers.whole + buffers.root),
        ]
        if any(stage.is_last for stage in stages):
            norm = tokens * norm_bytes(self.model.norm, self.model.width, self.number, "cpu" if on_cpu else "cuda")
            at_loss = activations + norm // (sizes.tp if self.layout.sequence_parallel else 1)
            moments.append(Moment(buffers.whole, at_loss, logits=self._logits(tokens, sizes, on_cpu)))
        most = max(moments, key=lambda moment: moment.total)
        return Memory(
            held.parameters,
            held.gradients,
            held.optimizer,
            buffers.gathered,
            most.gradient_buffers,
            most.activations,
            self._messages(parts, passes, stream // (sizes.tp if self.layout.sequence_parallel else 1)),
            most.working,
            most.logits,
            0 if on_cpu else RUNTIME_BYTES,
        )

    def _block_bytes(self, passes: Passes, recompute: Any, on_cpu: bool) -> int:
        return block_activation_bytes(
            self.model,
            passes.sequences,
            precision=self.precision,
            recompute=recompute,
            layout=self.layout,
            documents=self.documents,
            device="cpu" if on_cpu else "cuda",
        )

    def _messages(self, parts: Parts, passes: Passes, stream: int) -> int:
        """Bytes of receive buffers for the residual stream from the previous stage and its gradient from the next."""
        if self.layout.stages == 1 or not isinstance(self.engine, FSDPConfig):
            return 0
        return stream * passes.count * sum((not stage.is_first) + (not stage.is_last) for stage in parts.stages)

    def _buffers(self, parts: Parts, sizes: Mesh) -> Buffers:
        """Bytes of gathered parameters and of unsharded gradients."""
        groups = [
            sum(one.elements for one in group)
            for stage in parts.stages
            for name, group in stage.groups
            if name != "root"
        ]
        roots = sum(one.elements for stage in parts.stages for one in stage.root)
        block, everything = max(groups, default=0), sum(groups) + roots
        number = self.number
        if isinstance(self.engine, DeepSpeedConfig):
            bucket = FP32 * min(everything, REDUCE_BUCKET)
            gathered = number * (2 * block + roots) if self.engine.zero == 3 else 0
            return Buffers(gathered, bucket + number * (everything if self.engine.zero < 2 else block))
        if sizes.gradient_parallel == 1:
            # Weights are cast where they are used, and autograd keeps the casts that are not recomputed.
            kept = sum(groups) if getattr(self.engine, "recompute", "none") == "none" else block
            return Buffers(number * kept if number < FP32 else 0)
        if sizes.pp > 1:
            return Buffers(number * everything, FP32 * everything, added=number * block)
        return Buffers(number * (2 * block + roots), 0, (FP32 + number) * block, (FP32 + number) * roots)

    def _logits(self, tokens: int, sizes: Mesh, on_cpu: bool) -> int:
        """Peak bytes of `models.loss.chunked_cross_entropy`."""
        rows, width, number = self.model.padded_vocab(self.vocab_size), self.model.width, self.number
        shared = self.layout.loss_parallel and sizes.tp > 1
        own = -(-rows // sizes.tp) if self.layout.loss_parallel else rows
        chunk = min(tokens, chunk_tokens(own, on_cpu))
        # Logits and their softmax in FP32, and the matmul's output in its own dtype where no kernel reads it directly.
        softmax = 2 * FP32 if shared or number == FP32 else FP32 + number + (FP32 if on_cpu else 0)
        matrix = own * width
        first = matrix * (FP32 + number * (number < FP32))
        held = max(chunk * own * softmax, chunk * own * (FP32 + number * (number < FP32)) + first)
        if chunk < tokens:
            held = chunk * own * softmax + matrix * FP32
        entered = tokens * width * number if shared and self.layout.sequence_parallel else 0
        cast = matrix * number if sizes.gradient_parallel == 1 and number < FP32 else 0
        return held + tokens * width * number + entered + cast

    def step(self, sizes: Mesh, passes: Passes) -> Step:
        """The computation and communication of one step."""
        software = Software(
            recomputes=getattr(self.engine, "recompute", "none"), compiled=getattr(self.engine, "compile", False)
        )
        works = rank_works(self.model, self.vocab_size, passes.sequences, self.layout, software, self.number)
        stages = tuple(self._stage(work, sizes, passes) for work in works)
        zero_once = isinstance(self.engine, DeepSpeedConfig) and self.engine.zero < 2
        return Step(
            stages,
            sizes,
            passes.count,
            self.precision,
            self.number,
            self.layout.pp_schedule,
            self.layout.pp_stages_per_rank,
            once_a_step=sizes.pp > 1 or zero_once,
        )

    def _stage(self, work: RankWork, sizes: Mesh, passes: Passes) -> StageWork:
        rank = work.places[0] * (sizes.world_size // sizes.pp)
        terms = self.terms(sizes, passes, rank)
        parts = _parts(self, sizes, rank)
        shards = parts.shards if isinstance(self.engine, FSDPConfig) else sizes.data_parallel
        whole = isinstance(self.engine, DeepSpeedConfig) and self.engine.zero == 0
        trained = sum(one.elements for one in parts.all) / (1 if whole else shards)
        found = {phase: tuple(term for term in terms if term.phase == phase) for phase in PHASES}
        return StageWork(
            work.block,
            work.ends,
            critical=found["activations"],
            messages=found["messages"],
            gathers=found["gathers"],
            reductions=found["reductions"],
            once=found["once"],
            blocks=work.blocks,
            trained=trained,
            ranks=len(work.places),
        )

    def terms(self, sizes: Mesh, passes: Passes, rank: int, *, on_cpu: bool = False) -> list[Term]:
        """The collectives of a step on a rank; see `communication` and `zero`."""
        what: dict[str, Any] = {"model": self.model, "vocab_size": self.vocab_size, "precision": self.precision}
        how: dict[str, Any] = {"sizes": sizes, "layout": self.layout, "passes": passes, "rank": rank}
        if isinstance(self.engine, DeepSpeedConfig):
            return zero(**what, **how, engine=self.engine, one_bucket=False)
        assert isinstance(self.engine, FSDPConfig)
        return communication(**what, **how, engine=self.engine, on_cpu=on_cpu)


PHASES = get_args(Phase)


def _check_covered(model: Any) -> None:
    """Refuse a model that the formulas do not cover."""
    if not isinstance(model, DecoderConfig):
        raise UserError(
            f"The formulas do not cover a model of arch '{model.arch}'",
            "model.arch",
            "Plan a decoder (llama, gpt2, qwen3, or your own that inherits DecoderConfig), or measure this one.",
        )
    if model.parallel_block or model.norm_at != "before" or model.window is not None:
        keys = {"parallel_block": model.parallel_block, "norm_at": model.norm_at != "before"}
        keys["sliding_window"] = model.window is not None
        key = next(name for name, is_set in keys.items() if is_set)
        raise UserError(
            f"The formulas do not cover model.{key} {getattr(model, key)}",
            f"model.{key}",
            "Measure this model instead.",
        )


def moments_of(optimizer: Any) -> Moments:
    """The state that an optimizer keeps of each parameter, from its section's `state_bytes`."""
    if optimizer.name == "adamw":
        return ADAM
    matrix = optimizer.state_bytes((32, 32))
    size = FP32 * 32 * 32
    return Moments(matrix // size, matrix % size > 0)


def _telling_places(pp: int) -> tuple[int, ...]:
    """Indices of the first, second, middle and last pp rank; one of these needs the most memory."""
    return tuple(sorted({0, min(1, pp - 1), pp // 2, pp - 1}))


def _parts(job: Job, sizes: Mesh, rank: int) -> Parts:
    return Parts.of(job.model, job.vocab_size, sizes, job.layout, rank)
