"""A run that is killed, stopped or moved is the run that was not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.checkpoint.saver import PHASES
from bigtrain.run import ExitCode
from bigtrain.storage import read_lines
from tests.training.kills import kill_and_compare

STEPS = 40
SAVE_EVERY = 7
EVALUATE_EVERY = 5
KILLS_PER_RUN = int(os.environ.get("BIGTRAIN_TEST_KILLS", "3"))
"""More of them by hand: each costs a restart."""
DEADLINE_S = 200.0


def start(config: Path, cwd: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bigtrain.cli", "train", str(config), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = ExitCode.FINISHED) -> str:
    _, output = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, output
    return output


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of the last step."""
    return read_tensors(run / "checkpoints", STEPS, prefix="")


def logged(run: Path, file: str) -> list[dict]:
    return list(read_lines(run / file))


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    return [(row["step"], row["loss"], row.get("val_loss")) for row in logged(run, "metrics.jsonl")]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    """Weights, optimizer, samples and metrics agree to the bit."""
    assert_same_weights(run, undisturbed)
    assert logged(run, "samples.jsonl") == logged(undisturbed, "samples.jsonl")
    assert losses(run) == losses(undisturbed)


def assert_same_weights(run: Path, undisturbed: Path) -> None:
    """Weights and optimizer agree to the bit."""
    state, expected = final_state(run), final_state(undisturbed)
    assert state.keys() == expected.keys()
    assert any(name.startswith("optimizer.") for name in state)
    different = [name for name in state if not torch.equal(state[name], expected[name])]
    assert not different


@pytest.fixture
def config(write_config: Callable) -> Path:
    return write_config(
        duration=f"{STEPS} steps",
        model={
            "arch": "llama", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 32, "tied": True,
            "dropout": 0.1,
        },
        precision="bf16",
        evaluation={"every": f"{EVALUATE_EVERY} steps", "batches": 2},
        checkpoint={"every": f"{SAVE_EVERY} steps"},
        job={"max_failures": 50},
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a run of a config that nothing disturbs, by its arguments; each is run once.

    All tests that request one have the same `config`.
    """
    known: dict[tuple[object, ...], Path] = {}

    def run(config: Path, *arguments: object) -> Path:
        if arguments not in known:
            place = tmp_path_factory.mktemp("undisturbed")
            finish(start(config, place, *arguments, "--name", "undisturbed"))
            known[arguments] = place / "runs" / "undisturbed"
        return known[arguments]

    return run


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's ranks by rank, found through its descendants' environment."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    ranks = {}
    for pid in parents:
        ancestor = pid
        while ancestor not in (0, launcher):
            ancestor = parents.get(ancestor, 0)
        if ancestor != launcher:
            continue
        try:
            variables = dict(
                item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item
            )
            command = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "bigtrain.training.rank" in command and "RANK" in variables:
            ranks[int(variables["RANK"])] = pid
    return ranks


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_ranks_killed_from_outside_wherever_they_are_leave_no_trace(tmp_path: Path, nproc: int) -> None:
    """In the loader, in the cache, while they fetch, in each phase of a save; `python -m tests.training.kills`."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"nproc {nproc}: aims, ranks and moments follow from seed {seed}")
    kills, problems = kill_and_compare(tmp_path.resolve(), KILLS_PER_RUN, nproc, seed)
    assert not problems
    assert len(kills) == KILLS_PER_RUN
    assert sum(not kill.struck for kill in kills) <= KILLS_PER_RUN // 3, "most must strike where they are aimed"


@pytest.mark.parametrize("how", [(), pytest.param(("layout.pp=2",), marks=pytest.mark.exhaustive)])
def test_a_run_killed_with_its_launcher_resumes_to_the_bit(
    config: Path, undisturbed: Callable[..., Path], tmp_path: Path, how: tuple[str, ...]
) -> None:
    process = start(config, tmp_path, *how, "--nproc", 2, "--name", "killed")
    run = tmp_path / "runs" / "killed"
    published = run / "checkpoints" / f"step_{2 * SAVE_EVERY:08d}" / "manifest.json"
    deadline = time.monotonic() + DEADLINE_S
    while not published.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    ranks = ranks_of(process.pid)
    process.kill()
    process.wait()
    finish(start(config, tmp_path, *how, "--nproc", 2, "--name", "killed"))
    assert not [pid for pid in ranks.values() if Path(f"/proc/{pid}").exists()]
    assert any(event["event"] == "resumed" and event["step"] >= SAVE_EVERY for event in logged(run, "events.jsonl"))
    assert_same_run(run, undisturbed(config, *how, "--nproc", 2))


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_a_run_killed_in_any_phase_of_a_save_goes_on_to_the_bit(config: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("die_in_a_save.py")
    finished = subprocess.run(
        [sys.executable, script, config, tmp_path / "runs"], capture_output=True, text=True, timeout=280,
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    report = json.loads(finished.stdout.splitlines()[-1])
    expected = report.pop("undisturbed")
    assert not expected.pop("killed")
    assert set(report) == set(PHASES)
    for phase, found in report.items():
        assert found.pop("killed"), f"it did not die in the phase {phase}, or did not go on"
        assert found == expected, phase


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, pytest.param(Path.unlink, id="remove", marks=pytest.mark.exhaustive)])
def test_a_damaged_checkpoint_is_passed_over_and_the_run_still_ends_the_same(
    config: Path, undisturbed: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Two of the damages that tests/checkpoint/test_commit.py finds, here in whole runs."""
    half = "duration=20 steps"
    finish(start(config, tmp_path, "--nproc", 1, "--name", "damaged", half))
    run = tmp_path / "runs" / "damaged"
    newest = run / "checkpoints" / "step_00000020"
    damage(next(newest.glob("*.distcp")))
    finish(start(config, tmp_path, "--nproc", 1, "--name", "damaged"))
    fallbacks = [event for event in logged(run, "events.jsonl") if event["event"] == "fallback"]
    assert [event["step"] for event in fallbacks] == [2 * SAVE_EVERY]
    assert "step 20 is damaged" in fallbacks[0]["cause"]
    assert_same_run(run, undisturbed(config, "--nproc", 1))


def test_stop_saves_exits_75_and_loses_no_step(config: Path, tmp_path: Path, bigtrain_here: Callable) -> None:
    process = start(config, tmp_path, "duration=100000 steps")
    run = tmp_path / "runs" / "tiny"
    deadline = time.monotonic() + DEADLINE_S
    while len(logged(run, "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    result = bigtrain_here("stop", "tiny")
    assert result.returncode == 0, result.stderr
    finish(process, ExitCode.STOPPED)
    done = logged(run, "metrics.jsonl")[-1]["step"]
    listed = json.loads(bigtrain_here("checkpoint", "list", "tiny", "--json").stdout)["checkpoints"]
    assert {"step": done, "verified": True} == {key: listed[-1][key] for key in ("step", "verified")}
    assert json.loads(bigtrain_here("status", "tiny", "--json").stdout)["state"] == "stopped"
    again = bigtrain_here("stop", "tiny")
    assert again.returncode == ExitCode.USER
    assert "not running" in again.stderr


@pytest.mark.slow
def test_a_finished_run_started_again_touches_nothing(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    path = write_config()
    assert bigtrain("train", path).returncode == 0
    run = tmp_path / "runs" / "tiny"
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    result = bigtrain("train", run / "config.yaml")
    assert result.returncode == 0
    assert "finished" in result.stderr
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


@pytest.mark.slow
def test_a_run_moves_between_process_counts_with_the_same_samples(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    """4 -> 2 -> 1 -> 3 processes, a batch of 10, one name: no sample twice, none lost, the losses of one process."""
    segments = [(4, 10), (2, 20), (1, 30), (3, STEPS)]
    sections = {"batch": {"size": 10}, "optimizer": {"lr": 1e-3, "eps": 1e-6}, "schedule": {"warmup": "20 steps"}}
    sections["evaluation"] = {"every": "5 steps", "batches": 3}
    for nproc, until in segments:
        result = bigtrain("train", write_config(duration=f"{until} steps", **sections), "--nproc", nproc)
        assert result.returncode == 0, result.stderr
    alone = bigtrain("train", write_config(duration=f"{STEPS} steps", **sections), "--name", "alone")
    assert alone.returncode == 0, alone.stderr
    moved, still = tmp_path / "runs" / "tiny", tmp_path / "runs" / "alone"
    assert logged(moved, "samples.jsonl") == logged(still, "samples.jsonl")
    ids = [sample for line in logged(moved, "samples.jsonl") for sample in line["ids"]]
    assert len(ids) == len(set(ids)) == 10 * STEPS
    of_moved, of_still = losses(moved), losses(still)
    assert [row[0] for row in of_moved] == list(range(1, STEPS + 1))
    assert [row[1] for row in of_moved] == pytest.approx([row[1] for row in of_still], rel=1e-5)
    held_out = [(mine[2], other[2]) for mine, other in zip(of_moved, of_still, strict=True) if other[2] is not None]
    # The moved run was also evaluated at the end of each segment, which is one of the other's evaluations too.
    assert len(held_out) == STEPS // 5
    assert [mine for mine, _ in held_out] == pytest.approx([other for _, other in held_out], rel=1e-5)
