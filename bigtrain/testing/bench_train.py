"""Compares the time of bigtrain's training step with that of a bare PyTorch loop: `bigtrain bench train`.

bigtrain's side is the full trainer: loader, engine, heartbeat, schedule and metrics.jsonl. The other side is
`plain_loop.train_step`, which gets its batches without a loader. Both train the same Llama of 11M parameters from the
same weights on the same batches, alternately in this process. A round has two pairs of steps: bigtrain and the bare
loop, and two more bare loops. The ratio of the second pair (A/A) measures the noise. Every second round swaps the order
in both pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bigtrain.data.index import load_index
from bigtrain.data.loader import Loader, StepBatch
from bigtrain.data.order.sample_order import SampleOrder
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.engines.config import Precision
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.hardware.this_machine import this_machine
from bigtrain.heartbeat import Heartbeat, StopRequest
from bigtrain.models.families.llama import Config as Llama
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.optim.schedules.constant import ConstantConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import RunDirectory
from bigtrain.testing import plain_loop
from bigtrain.training.agent_link import AgentLink
from bigtrain.training.bad_steps import Policy
from bigtrain.training.boundaries import Boundaries
from bigtrain.training.callback import Callback, Step
from bigtrain.training.config import BadStepsConfig
from bigtrain.training.evaluation import Evaluated
from bigtrain.training.logs import MetricsLog
from bigtrain.training.loop import Trainer
from bigtrain.training.progress import Progress

VOCABULARY, CONTEXT = 1024, 256
MODEL = Llama(layers=6, width=384, heads=6, context=CONTEXT, tied=True)
OPTIMIZER = AdamWConfig(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
CLIP = 1.0
"""The default of `optimizer.clip`."""
SEED = 0
WARMUP_ROUNDS = 3
BOOTSTRAPS = 2000
ALLOWED = 0.02
"""Share by which bigtrain's step may be slower than the bare loop's, in addition to the noise."""
MAX_NOISE = 0.02
SAME_LOSS = {"fp32": 1e-4, "bf16": 1e-2}
"""Largest relative difference of the two sides' losses: times are comparable only if both compute the same."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""wall: elapsed seconds. cpu: CPU seconds of all threads of this process, for a busy machine. It needs one thread,
because torch's threads use CPU time while they wait."""

Clock = Callable[[], float]
PlainStep = Callable[[plain_loop.Batch], float]


@dataclass
class Timings:
    """Seconds of the four steps of each round."""

    native: list[float] = field(default_factory=list)
    plain: tuple[list[float], list[float], list[float]] = field(default_factory=lambda: ([], [], []))
    """The bare loop that is compared with bigtrain, and the two bare loops that are compared with each other."""


@dataclass
class Interleaved:
    """A loader for the trainer that runs the steps of the bare loops between two steps of the trainer.

    The time of bigtrain's step is that between two requests for a batch, without the bare loops: the wait for data, the
    step itself, and the callbacks of the step before.
    """

    loader: Loader
    steps: tuple[PlainStep, PlainStep, PlainStep]
    rounds: int
    clock: Clock
    timings: Timings = field(default_factory=Timings)
    losses: list[float] = field(default_factory=list)

    @property
    def data_wait_s(self) -> float:
        """Seconds for which the real loader has waited for data."""
        return self.loader.data_wait_s

    def batches(self, first_step: int) -> Iterator[StepBatch]:
        """The real loader's batches; one round is measured for each."""
        ahead = self.loader.batches(first_step)
        for number in range(self.rounds):
            arrays = self.loader.batch(number).micro_batches[0]
            tokens, targets, weights = (torch.from_numpy(arrays[name]) for name in ("tokens", "targets", "weights"))
            batch = (tokens, targets, weights)
            swapped = bool(number % 2)
            if swapped:
                self._plain(0, batch)
            began = self.clock()
            yield next(ahead)
            self.timings.native.append(self.clock() - began)
            for which in (2, 1) if swapped else (0, 1, 2):
                self._plain(which, batch)

    def _plain(self, which: int, batch: plain_loop.Batch) -> None:
        began = self.clock()
        loss = self.steps[which](batch)
        self.timings.plain[which].append(self.clock() - began)
        if which == 0:
            self.losses.append(loss)


class Losses(Callback):
    """Keeps the loss of each of the trainer's steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, step: Step, progress: Progress) -> None:
        """Append the step's mean loss."""
        self.losses.append(step.loss_sum / step.weight)


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, run the benchmark and print the result."""
    parser = argparse.ArgumentParser(prog="bigtrain bench train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=15, help="pairs that are timed")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; torch's default if not given")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="cpu: for a busy machine, with --threads 1"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    result = bench(options.pairs, options.precision, options.batch, options.clock)
    print(json.dumps(result) if options.json else table(result))


def bench(pairs: int, precision: Precision = "fp32", batch: int = 4, clock: str = "wall") -> dict[str, Any]:
    """Time `pairs` pairs of steps of each kind.

    Returns:
        Facts about the machine and the model. "bigtrain" and "a_a": the median ratio of a pair, the quartiles, and the
        95 % confidence interval of the median. "within": whether bigtrain's step is within the allowed overhead; None
        if the noise is too large to decide.
    """
    with tempfile.TemporaryDirectory(prefix="bigtrain-bench-") as place:
        timings = _measure(Path(place), WARMUP_ROUNDS + pairs + 1, precision, batch, CLOCKS[clock])
    # The trainer requests no batch after its last step, so that step has no time.
    counted = slice(WARMUP_ROUNDS, WARMUP_ROUNDS + pairs)
    native, plain, one, other = (seconds[counted] for seconds in (timings.native, *timings.plain))
    ratios = {
        "bigtrain": [own / bare for own, bare in zip(native, plain, strict=True)],
        "a_a": [first / second for first, second in zip(one, other, strict=True)],
    }
    summaries = {name: summary(values) for name, values in ratios.items()}
    noise = max(abs(end - 1) for end in summaries["a_a"]["interval"])
    machine = this_machine(use_torch=True)
    return {
        "device": machine.device_name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": precision,
        "parameters": MODEL.parameter_count(VOCABULARY),
        "tokens": batch * CONTEXT,
        "pairs": pairs,
        "clock": clock,
        "step_s": {
            "bigtrain": round(statistics.median(native), 5),
            "plain": round(statistics.median(plain), 5),
        },
        **summaries,
        "noise": round(noise, 5),
        "allowed": ALLOWED,
        # With more noise than this the measurement decides nothing.
        "within": None if noise > MAX_NOISE else summaries["bigtrain"]["median"] - 1 <= ALLOWED + noise,
    }


def _measure(place: Path, rounds: int, precision: Precision, batch: int, clock: Clock) -> Timings:
    engine: Any = FSDPConfig().build(
        MODEL, VOCABULARY, OPTIMIZER, layout=LayoutConfig(), precision=precision, seed=SEED, ranks=Ranks(0, 0, 1),
    )  # fmt: skip
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    one, two, three = (_plain_step(weights, precision) for _ in range(3))
    pack([Path(argparse.__file__)], place / "shards", Tokenizer.open("bytes"))
    index = load_index(place / "shards" / "train")
    order = SampleOrder(SEED, index.fingerprint, index.sequence_counts(CONTEXT), window=1)
    losses = Losses()
    with Loader(index, order, batch_size=batch, context=CONTEXT, seed=SEED) as loader:
        interleaved = Interleaved(loader, (one, two, three), rounds, clock)
        directory = RunDirectory(place / "run")
        directory.path.mkdir()
        metrics = MetricsLog(
            directory, every=1, mfu=lambda rate: None, mfu_causal=lambda rate: None, memory_bytes=lambda: 0
        )
        Trainer(
            engine,
            interleaved,
            ConstantConfig().build(OPTIMIZER.lr, rounds, lambda duration: 0),
            Boundaries(total_steps=rounds, evaluate_every=None, save_every=None),
            progress=Progress(),
            control=AgentLink(Heartbeat.from_environment({}), StopRequest(), None),
            evaluate=Evaluated,
            save=lambda progress: True,
            finish=lambda: True,
            policy=Policy(BadStepsConfig()),
            roll_back=lambda asked: None,
            callbacks=[metrics, losses],
            drawn=lambda step: {"train": step * batch},
        ).fit()
    _check_same(losses.losses, interleaved.losses, precision)
    return interleaved.timings


def _plain_step(weights: dict[str, torch.Tensor], precision: Precision) -> PlainStep:
    """A function that runs one step of a bare loop with its own model, which starts from the given weights.

    The function returns the loss, which waits for the end of the step.
    """
    hidden = weights["layers.0.mlp.gate.weight"].shape[0]
    model = plain_loop.Llama(VOCABULARY, MODEL.layers, MODEL.width, MODEL.heads, hidden, CONTEXT)
    model.load_state_dict(plain_loop.named_weights(weights))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)

    def step(batch: plain_loop.Batch) -> float:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            return float(plain_loop.train_step(model, optimizer, batch, OPTIMIZER.lr, CLIP))

    return step


def _check_same(native: list[float], plain: list[float], precision: Precision) -> None:
    for step, (own, expected) in enumerate(zip(native, plain, strict=False)):
        if abs(own / expected - 1) > SAME_LOSS[precision]:
            raise RuntimeError(f"step {step}: bigtrain's loss is {own}, the bare loop's {expected}: not the same work")


def summary(ratios: list[float]) -> dict[str, Any]:
    """Median, quartiles, and the 95 % confidence interval of the median by the bootstrap (Efron 1979)."""
    chance = random.Random(SEED)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(BOOTSTRAPS))
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "median": round(statistics.median(ratios), 5),
        "quartiles": [round(low, 5), round(high, 5)],
        "interval": [round(medians[int(BOOTSTRAPS * 0.025)], 5), round(medians[int(BOOTSTRAPS * 0.975)], 5)],
    }


def table(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""

    def percent(ratio: float) -> str:
        return f"{100 * (ratio - 1):+.2f} %"

    lines = [
        f"A step of {result['parameters'] / 1e6:.1f}M parameters on {result['tokens']:,} tokens in "
        f"{result['precision'].upper()}, {result['pairs']} pairs",
        f"{result['device']}, {result['threads']} threads, load {result['load']}; torch {result['torch']}, "
        f"Python {result['python']}",
        "",
        f"{'':24}{'median':>10}{'half of the pairs':>24}{'95 % of the median':>24}",
    ]
    for name, title in (("bigtrain", "bigtrain / bare loop"), ("a_a", "bare / bare (A/A)")):
        row = result[name]
        spans = [" to ".join(percent(end) for end in row[key]) for key in ("quartiles", "interval")]
        lines.append(f"{title:24}{percent(row['median']):>10}{spans[0]:>24}{spans[1]:>24}")
    seconds = result["step_s"]
    verdict = {True: "within", False: "MORE than", None: "too noisy to say whether within"}[result["within"]]
    lines += [
        "",
        f"step, {result['clock']} time: bigtrain {1000 * seconds['bigtrain']:.1f} ms, "
        f"bare loop {1000 * seconds['plain']:.1f} ms",
        f"{verdict} the {100 * result['allowed']:.0f} % allowed beyond the noise of {100 * result['noise']:.2f} %",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
