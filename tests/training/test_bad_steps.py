"""Runs with gradients that are not finite, or losses that jump, end as a run that skips those batches by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config.plugin import load_plugin
from bigtrain.data.loader import Loader
from bigtrain.data.order.sample_order import sequence_keys
from bigtrain.heartbeat import Heartbeat, StopRequest
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import RunDirectory, load_config
from bigtrain.storage import read_lines
from bigtrain.training.bad_steps import BadStepsError
from bigtrain.training.loop import Outcome
from bigtrain.training.prepare import prepare
from bigtrain.training.session import Session

PLUGIN = Path(__file__).with_name("poisoned_model.py")
SEED, BATCH, STEPS = 1337, 4, 12


def keys(*batches: int) -> list[int]:
    """Of the last sequence of each of these global batches."""
    return [int(sequence_keys(SEED, batch, np.array([BATCH - 1]))[0]) for batch in batches]


def train(config: Path, tmp_path: Path, duration: str) -> RunDirectory:
    """What a rank does in a process of its own, here: from the newest checkpoint to the end."""
    load_plugin(str(PLUGIN))
    run = load_config(config, [f"duration={duration}"])
    prepared = prepare(run)
    directory = RunDirectory(tmp_path / "runs" / run.name)
    directory.write(run, prepared.what)
    with Session(prepared, directory, Heartbeat.from_environment({}), StopRequest()) as session:
        assert session.train() is Outcome.FINISHED
    return directory


def by_hand(config: Path, batches: list[int | None]) -> dict[str, Tensor]:
    """The state after steps on these batches by hand, in this process; None: a step that updates nothing."""
    load_plugin(str(PLUGIN))
    run = load_config(config, [f"duration={STEPS} steps"])
    prepared = prepare(run)
    engine = run.engine.build(
        run.model, prepared.outputs, run.optimizer,  layout=run.layout, precision=run.precision,
        seed=run.seed, ranks=Ranks(0, 0, 1),
    )  # fmt: skip
    options: dict[str, Any] = {"batch_size": BATCH, "context": prepared.context, "seed": run.seed}
    with Loader(prepared.sources, prepared.order, **options) as loader:
        for step, batch in enumerate(batches):
            if batch is not None:
                engine.train_step(step, loader.batch(batch).micro_batches, prepared.schedule.lr(step))
    return engine.state()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], list[int | None], list[str]]] = {
    "skipped": (
        {"endless": keys(3, 4, 8)}, {"limit": 3},
        [0, 1, 2, None, None, 5, 6, 7, None, 9, 10, 11],
        ["skipped 4", "skipped 5", "skipped 9"],
    ),
    "too many in a row": (
        {"endless": keys(4, 5, 6)}, {"limit": 3, "rewind": 0, "skip": 1},
        # Steps 5 to 7 were bad: back to step 4, past batch 7.
        [0, 1, 2, 3, *range(8, 16)],
        ["skipped 5", "skipped 6", "rolled_back 7"],
    ),
    "a spike": (
        {"high": keys(8)}, {"spike": 6.0, "window": 5, "rewind": 3, "skip": 2},
        # Step 9 jumps: back to step 6, past batches 9 and 10.
        [0, 1, 2, 3, 4, 5, *range(11, 17)],
        ["rolled_back 9"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_with_bad_steps_equals_one_that_skips_them_by_hand(
    case: str, write_config: Callable, tmp_path: Path
) -> None:
    model, policy, batches, expected_events = CASES[case]
    config = write_config(
        model={"arch": "poisoned", "context": 32, **model}, bad_steps=policy, checkpoint={"every": "2 steps"},
        optimizer={"lr": 1e-3},
    )  # fmt: skip
    # A resume in the middle: what the policy remembers is in the checkpoint.
    train(config, tmp_path, "10 steps")
    run = train(config, tmp_path, f"{STEPS} steps")
    state, expected = read_tensors(run.checkpoints, STEPS, prefix=""), by_hand(config, batches)
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.equal(state[name], expected[name])]

    events = [event for event in read_lines(run.events) if event["event"] in ("skipped", "rolled_back")]
    assert [f"{event['event']} {event['step']}" for event in events] == expected_events
    assert all(event["cause"] for event in events)
    rows = list(read_lines(run.metrics))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    skipped = sum(batch is None for batch in batches)
    assert rows[-1]["skipped_steps"] == skipped
    assert sum(row["loss"] is None for row in rows) == skipped
    samples = list(read_lines(run.samples))
    assert [line["step"] for line in samples] == list(range(1, STEPS + 1))
    assert len({sample for line in samples for sample in line["ids"]}) == STEPS * BATCH


def test_a_run_that_meets_nothing_else_stops_with_the_reason(write_config: Callable, tmp_path: Path) -> None:
    config = write_config(
        model={"arch": "poisoned", "context": 32, "endless": keys(*range(2, 8))},
        bad_steps={"limit": 3, "then": "stop"},
    )  # fmt: skip
    with pytest.raises(BadStepsError, match="3 steps in a row had no finite gradient, the last one step 5"):
        train(config, tmp_path, "8 steps")
