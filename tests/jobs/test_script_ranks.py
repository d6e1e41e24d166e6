"""Scripts of a user's own under the launcher: how they end, are restarted and stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.causes import Fault, Kind, RetryBudget, fault_of_exit
from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.generation import Generation
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.jobs.scripts.launch import job_config, script_environment, script_launch
from bigtrain.run import RunDirectory

SHORT_SILENCE_S = 1.0
DEADLINE_S = 120


def run_script(job: Any, text: str, section: JobConfig | None = None, procs: int = 1, **options: Any) -> int:
    """Run a script by the real launcher; returns the exit code."""
    script = job.path / "script.py"
    script.write_text(text)
    section = section or JobConfig()
    call = ScriptCall(str(script))
    environment = job.environment() | script_environment(call, RunDirectory(job.path), section)
    launch = script_launch(call, section, procs)
    return int(job.launch(job=section, launch=launch, environment=environment, **options))


def test_a_node_whose_ranks_have_ended_waits_for_the_others(job: Any, machines: Callable[..., Any]) -> None:
    placer = machines("ab", (2,), silence_s=SHORT_SILENCE_S)
    text = "import os, time\ntime.sleep(4 if os.environ['RANK'] == '0' else 0)\nprint('end of', os.environ['RANK'])\n"
    assert run_script(job, text, JobConfig(nodes=2), placer=placer) == 0
    assert [entry["event"] for entry in job.events] == ["finished"]
    assert "end of 0" in job.log(0, 0)
    assert "ending the ranks" not in (job.path / "logs" / "agent.log").read_text()


def test_bigtrains_ranks_that_evaluate_after_the_others_have_ended_are_waited_for(
    job: Any, machines: Callable[..., Any]
) -> None:
    job.write_rank(f"""
train(3)
if rank == 0:
    page.beat(3, "stopping")
    time.sleep({4 * SHORT_SILENCE_S})
""")
    placer = machines("ab", (2,), silence_s=SHORT_SILENCE_S)
    assert job.launch(nproc=1, job=JobConfig(nodes=2), placer=placer) == 0
    assert [entry["event"] for entry in job.events] == ["finished"]


def test_a_node_that_is_lost_after_its_ranks_have_ended_is_no_fault(
    job: Any, machines: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    placer = machines("ab", (2,), silence_s=SHORT_SILENCE_S)
    text = """
import os, time, pathlib
run = pathlib.Path(os.environ["BIGTRAIN_RUN"])
if os.environ["RANK"] == "0":
    while not (run / "lost").exists():
        time.sleep(0.05)
"""

    ended, handle = threading.Event(), Generation._handle

    def heard(generation: Generation, node: int, message: Any) -> None:
        handle(generation, node, message)
        if message["type"] == "ended":
            ended.set()

    def lose() -> None:
        ended.wait(DEADLINE_S)
        placer.lose("b")
        time.sleep(0.5)
        (job.path / "lost").touch()

    monkeypatch.setattr(Generation, "_handle", heard)
    thread = threading.Thread(target=lose)
    thread.start()
    assert run_script(job, text, JobConfig(nodes=2), placer=placer) == 0
    thread.join()
    assert [entry["event"] for entry in job.events] == ["finished"]


def test_the_limit_after_the_first_end_holds_where_it_is_set(job: Any) -> None:
    text = "import os, time\ntime.sleep(60 if os.environ['RANK'] == '0' else 0)\n"
    section = JobConfig.model_validate({"max_failures": 0, "script": {"exit": 0.5}})
    assert run_script(job, text, section, procs=2) == 1
    [fault] = job.named("fault")
    assert "exited with 0" in fault["cause"]
    assert "while other ranks continued" in fault["cause"]


def test_every_fault_of_a_script_is_retried_until_the_budget_is_spent(job: Any) -> None:
    text = """
import os, sys
count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if count == 0:
    sys.exit(2)
if count < 3:
    raise ValueError("the same each time")
"""
    assert run_script(job, text, JobConfig(max_failures=3)) == 0
    assert len(job.named("restarted")) == 3
    causes = [fault["cause"] for fault in job.named("fault")]
    assert causes[0].endswith("exited with 2")
    assert all(cause.endswith("raised ValueError: the same each time") for cause in causes[1:])


def test_the_budget_of_a_script_is_spent_by_equal_faults() -> None:
    same = Fault(Kind.EXCEPTION, "raised", "host", 0, 0, "Traceback (most recent call last):\nValueError: x")
    budget = RetryBudget(2, lambda: 0, reports_steps=False)
    assert [budget.judge(same).retry for _ in range(3)] == [True, True, False]
    assert RetryBudget(2, lambda: 0, reports_steps=False).judge(same).reason == ""


@pytest.mark.parametrize("code", [2, 3])
def test_exit_codes_of_a_script_do_not_mean_what_bigtrains_mean(code: int) -> None:
    message = {
        "rank": 0, "step": 0, "phase": "step", "traceback": None, "tail": "error: mine", "signal": None, "code": code,
    }  # fmt: skip
    fault = fault_of_exit(message, "a", reports_steps=False)
    assert fault.kind is Kind.EXCEPTION
    assert fault.cause == f"rank 0 on host a exited with {code}"


def test_the_code_of_a_stopped_run_is_a_failure_without_a_request(job: Any) -> None:
    assert run_script(job, "import sys; sys.exit(75)", JobConfig(max_failures=0)) == 1
    assert not job.named("stopped")


def stopping(job: Any, level: int) -> Callable[[Any], Any]:
    """Enters with the controller: asks it to stop, once the script runs."""
    import contextlib

    @contextlib.contextmanager
    def around(controller: Any) -> Any:
        def ask() -> None:
            while not (job.path / "ready").exists():
                time.sleep(0.02)
            for _ in range(level):
                controller.request_stop()
                time.sleep(0.2)

        thread = threading.Thread(target=ask)
        thread.start()
        yield
        thread.join()

    return around


DEAF = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(os.environ["BIGTRAIN_RUN"], "ready").touch()
time.sleep(120)
"""


def test_a_script_that_ignores_sigterm_is_killed_after_its_grace(job: Any) -> None:
    section = JobConfig.model_validate({"script": {"stop": 0.5}})
    before = time.monotonic()
    assert run_script(job, DEAF, section, around=stopping(job, 1)) == 75
    assert time.monotonic() - before < 60
    [stopped] = job.named("stopped")
    assert "did not end within 0.5 s of SIGTERM and were killed" in stopped["cause"]
    assert any("SIGKILL after 0.5 s" in line for line in job.said)
    assert not any("resume" in line for line in job.said)


def test_a_script_that_is_ended_at_once_counts_as_stopped(job: Any) -> None:
    assert run_script(job, DEAF, around=stopping(job, 2)) == 75
    [stopped] = job.named("stopped")
    assert "killed on request" in stopped["cause"]


def test_torchrun_gives_thirty_seconds_and_so_do_we() -> None:
    assert JobConfig().script.stop == 30
    assert JobConfig().script.exit is None


def test_job_keys_of_a_script_are_set_on_the_command_line() -> None:
    job = job_config(["job.max_failures=7", "job.limits.step=5 min"], nodes=2)
    assert (job.max_failures, job.limits.step, job.nodes) == (7, 300.0, 2)


def test_the_placeholder_of_torchrun_is_filled_in_and_nothing_else_is_changed() -> None:
    words = ["s3://bucket//a", "./out/", "$HOME", "a  b", "--", "--log=${local_rank}"]
    command = ScriptCall("t.py", words).command("python", "3")
    assert command == ["python", "-u", "t.py", *words[:-1], "--log=3"]
    first = ScriptCall("pkg.main", ["x"], module=True, local_rank_argument=True).command("python", "1")
    assert first == ["python", "-u", "-m", "pkg.main", "--local_rank=1", "x"]


def test_threads_are_torchruns(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_script(job, "import os; print('threads', os.environ.get('OMP_NUM_THREADS'))", procs=2) == 0
    assert "threads 1" in job.log(0, 1)


def test_a_users_threads_are_kept(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert run_script(job, "import os; print('threads', os.environ.get('OMP_NUM_THREADS'))", procs=2) == 0
    assert "threads 5" in job.log(0, 0)


def test_the_error_file_lies_beside_the_log(job: Any) -> None:
    text = "import os, pathlib; pathlib.Path(os.environ['TORCHELASTIC_ERROR_FILE']).write_text('{}')\n"
    assert run_script(job, text) == 0
    assert Path(job.path, "logs", "attempt_0", "rank_0_error.json").exists()
