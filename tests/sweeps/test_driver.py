"""The driver with real processes that train nothing: crashes, kills, stops, trials that never fit (fault case 35)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.run import ExitCode, Lease
from bigtrain.storage import read_lines
from bigtrain.sweeps.driver import let_retry
from bigtrain.sweeps.journal import Journal, SweepDirectory, read_state
from bigtrain.sweeps.status import sweep_status
from tests.sweeps.tiny_driver import SHORT

WriteSweep = Callable[..., Path]
TINY_DRIVER = Path(__file__).parent / "tiny_driver.py"
ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0
HUGE = {"layers": 200, "width": 65536, "heads": 512, "mlp_width": 262144}
"""1e13 parameters: no machine of this decade holds them."""


class Drivers:
    """Starts drivers, and leaves none behind."""

    def __init__(self, sweep: Path, runs_dir: Path) -> None:
        self.sweep, self.runs_dir = sweep, runs_dir
        self.directory = SweepDirectory(runs_dir / "tiny")
        self._started: list[subprocess.Popen[str]] = []

    def start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, str(TINY_DRIVER), str(self.sweep), str(self.runs_dir)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        _, said = process.communicate(timeout=DEADLINE_S)
        return process.returncode, said

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, "it did not come"
            time.sleep(0.01)
        return found

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.directory.journal) if line["event"] == event]

    def pid_at(self, trial: str, step: int) -> int:
        """The process of a trial, once it has taken a step."""
        run = self.directory.run(trial)
        self.until(lambda: any(row["step"] >= step for row in read_lines(run.metrics)))
        return int((run.path / "pid").read_text())

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            if process.stderr is not None and not process.stderr.closed:
                process.communicate()


@pytest.fixture
def drivers(write_sweep: WriteSweep, tmp_path: Path) -> Iterator[Drivers]:
    sizes: list[Any] = [
        {"params": 1300, "tokens_per_param": [8, 16]},
        {"params": 3000, "tokens_per_param": [4]},
        {"params": 5000, "tokens_per_param": [3]},
        {"params": 10_000_000_000_000, "model": HUGE, "tokens": [1000]},
    ]
    found = Drivers(write_sweep(sizes=sizes), tmp_path / "runs")
    yield found
    found.end()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_six_trials_on_two_slots_through_a_crash_a_refusal_and_a_killed_driver(drivers: Drivers) -> None:
    directory = drivers.directory
    directory.trials.mkdir(parents=True)
    (directory.trials / "hold").touch()
    first = drivers.start()
    running = drivers.until(lambda: [line["trial"] for line in drivers.lines("started")][:2])
    assert [line["trial"] for line in drivers.lines("refused")] == ["n10T-s1337-d4"]
    killed = drivers.pid_at(running[0], 7)
    os.kill(killed, signal.SIGKILL)
    drivers.until(lambda: [line for line in drivers.lines("ended") if line["retry"]])
    second = drivers.start()
    code, said = drivers.finish(second)
    assert code == ExitCode.USER
    assert "in use by process" in said
    assert "bigtrain sweep stop tiny" in said
    again = directory.run(running[0]).path / "pid"
    pid = drivers.until(lambda: int(again.read_text() or killed) != killed and int(again.read_text()))
    first.kill()
    first.communicate()
    drivers.until(lambda: not is_alive(pid))
    finished = {line["trial"] for line in drivers.lines("finished")}
    with open(directory.journal, "ab") as file:
        file.write(b'{"time": 1, "event": "fini')
    (directory.trials / "hold").unlink()
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.FAILED, said
    assert "n10T-s1337-d4: refused" in said
    assert "between two trials on a slot" in said
    status = sweep_status(directory)
    assert (status["state"], status["finished"], status["refused"]) == ("failed", 5, 1)
    assert len(status["trials"]) == 6
    after = [line["trial"] for line in drivers.lines("started")]
    assert not finished & set(after[after.index(running[0]) + 3 :])
    for trial in (row["trial"] for row in status["trials"] if row["state"] == "finished"):
        run = directory.run(trial)
        assert not (run.path / "twice").exists()
        assert len([line for line in drivers.lines("finished") if line["trial"] == trial]) == 1
    assert status["flops_saved"] > 0
    rows = list(read_lines(directory.runs))
    assert [row["run"] for row in rows] == [row["trial"] for row in status["trials"] if row["state"] == "finished"
                                            and row["kind"] == "branch"]  # fmt: skip
    # D is what a run has counted, which is less than its steps have places for.
    assert {256 * row["steps"] - row["tokens"] for row in rows} == {SHORT}
    with pytest.raises(UserError, match="cannot be retried"):
        let_retry(directory, rows[0]["run"])
    # Nothing that has finished is touched again.
    before = directory.runs.read_text(), len(drivers.lines("started"))
    assert drivers.finish(drivers.start())[0] == ExitCode.FAILED
    assert (directory.runs.read_text(), len(drivers.lines("started"))) == before


@pytest.mark.slow
def test_a_stop_lets_the_trials_save_and_a_longer_sweep_goes_on(drivers: Drivers, write_sweep: WriteSweep) -> None:
    drivers.sweep = write_sweep(sizes=[{"params": 1300, "tokens_per_param": [8, 16]}])
    drivers.directory.trials.mkdir(parents=True)
    (drivers.directory.trials / "hold").touch()
    first = drivers.start()
    trunk = "n1.3k-s1337-trunk"
    drivers.pid_at(trunk, 7)
    first.send_signal(signal.SIGINT)
    code, said = drivers.finish(first)
    assert code == ExitCode.STOPPED, said
    assert "bigtrain sweep resume tiny" in said
    saved = [line for line in drivers.lines("ended") if line["trial"] == trunk]
    assert [(line["code"], line["retry"]) for line in saved] == [(75, False)]
    assert sweep_status(drivers.directory)["state"] == "waiting"
    (drivers.directory.trials / "hold").unlink()
    assert drivers.finish(drivers.start())[0] == ExitCode.FINISHED
    # Points that are added: a D in the middle and one beyond, from what the trunk has saved.
    drivers.sweep = write_sweep(sizes=[{"params": 1300, "tokens_per_param": [8, 12, 16, 24]}])
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.FINISHED, said
    trials = read_state(drivers.directory.journal).planned()
    assert [trial.name for trial in trials if trial.kind == "trunk"] == [trunk, f"{trunk}-2"]
    second = trials[[trial.name for trial in trials].index(f"{trunk}-2")]
    assert (second.parent, second.parent_step) == (trunk, min(trials[0].save_at))
    steps = [row["step"] for row in read_lines(drivers.directory.run(trunk).metrics)]
    assert steps == list(range(1, trials[0].steps + 1))
    drivers.sweep = write_sweep(sizes=[{"params": 1300, "tokens_per_param": [8, 32], "lr": 0.001}])
    code, said = drivers.finish(drivers.start())
    assert (code, "learning rate 0.003 -> 0.001" in said) == (ExitCode.USER, True), said
    # Another rate for the same sweep is another sweep.
    drivers.sweep = write_sweep(tokens_per_param=[8], ladder={"lr": {"value": 0.5}})
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.USER
    assert "trains something else" in said


def test_a_budget_that_is_exceeded_starts_nothing(drivers: Drivers, write_sweep: WriteSweep) -> None:
    sizes = [{"params": 1300, "tokens_per_param": [8]}]
    drivers.sweep = write_sweep(sizes=sizes, budget={"flops": 1e6})
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.USER
    assert "but the budget is 1e+06" in said
    assert not drivers.directory.journal.exists()


@pytest.mark.slow
def test_what_has_finished_counts_against_the_budget(drivers: Drivers, write_sweep: WriteSweep) -> None:
    sizes = [{"params": 1300, "tokens_per_param": [8]}]
    drivers.sweep = write_sweep(sizes=sizes)
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.FINISHED, said
    (done,) = [one.trial.own_flops for one in read_state(drivers.directory.journal).trials.values()]
    more = [*sizes, {"params": 3000, "tokens_per_param": [4]}]
    drivers.sweep = write_sweep(sizes=more, budget={"flops": 1.01 * done})
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.USER
    assert "1 finished trials included" in said


@pytest.mark.slow
def test_a_rate_at_the_edge_is_refused_until_the_factors_are_widened_as_advised(
    drivers: Drivers, write_sweep: WriteSweep
) -> None:
    drivers.sweep = write_sweep(sizes=[1300], learning_rates={"factors": [2, 4, 8], "tokens_per_param": 2})
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.FAILED
    assert "is the smallest tried; add smaller ones to learning_rates.factors" in said
    assert "size 1300: no learning rate was chosen" in said
    status = sweep_status(drivers.directory)
    assert (status["state"], status["undecided"]) == ("failed", [1300])
    journal = Journal(drivers.directory.journal)
    assert {record.trial.kind for record in journal.state.trials.values()} == {"tuning"}
    drivers.sweep = write_sweep(sizes=[1300], learning_rates={"factors": [0.5, 1, 2, 4, 8], "tokens_per_param": 2})
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.FINISHED, said
    assert {trial.lr for trial in read_state(drivers.directory.journal).planned() if trial.kind == "branch"} == {0.003}
    assert sweep_status(drivers.directory)["undecided"] == []
    # Of those tried before, none is tried again.
    assert len(drivers.lines("started")) == len({line["trial"] for line in drivers.lines("started")})


@pytest.mark.slow
def test_a_rate_that_diverges_is_reported_and_the_best_of_the_others_taken(
    drivers: Drivers, write_sweep: WriteSweep
) -> None:
    drivers.sweep = write_sweep(sizes=[1300], learning_rates={"factors": [0.5, 1, 1000], "tokens_per_param": 2})
    code, said = drivers.finish(drivers.start())
    assert "size 1300: the learning rate 3 diverged" in said
    assert "size 1300: learning rate 0.003" in said
    assert code == ExitCode.FINISHED, said
    assert sweep_status(drivers.directory)["state"] == "finished"
    branches = [one for one in read_state(drivers.directory.journal).trials.values() if one.trial.kind == "branch"]
    assert {one.state for one in branches} == {"finished"}


@pytest.mark.slow
def test_a_sweep_goes_on_when_the_reader_of_its_output_has_left(drivers: Drivers, write_sweep: WriteSweep) -> None:
    drivers.sweep = write_sweep(sizes=[{"params": 1300, "tokens_per_param": [8]}])
    process = drivers.start()
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(DEADLINE_S) == ExitCode.FINISHED
    assert sweep_status(drivers.directory)["state"] == "finished"


@pytest.mark.slow
def test_a_trial_that_fails_by_itself_is_not_tried_again_until_requested(
    drivers: Drivers, write_sweep: WriteSweep
) -> None:
    drivers.sweep = write_sweep(sizes=[{"params": 1300, "tokens_per_param": [4], "lr": 1.0}])
    code, said = drivers.finish(drivers.start())
    assert code == ExitCode.FAILED
    assert "the loss of step 3 is nan" in said
    name = "n1.3k-s1337-d21"
    assert len(drivers.lines("started")) == 1
    let_retry(drivers.directory, name)
    assert read_state(drivers.directory.journal).get(name).state == "waiting"
    assert drivers.finish(drivers.start())[0] == ExitCode.FAILED
    assert len(drivers.lines("started")) == 2
    holder = Lease.holder(drivers.directory)
    assert holder is not None
    assert not holder.alive()


def test_a_journal_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({"time": 1, "event": "created", "format_version": 99, "sweep": "x"}) + "\n")
    with pytest.raises(UserError, match="format version 99"):
        read_state(path)
