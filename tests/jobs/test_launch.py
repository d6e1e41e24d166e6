"""A run on this machine, from its start to each way in which it can end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigtrain.jobs.config import JobConfig

P1_SEEN_S = 2.0
P2_MARGIN_S = 5.0


def short_limits(**options: Any) -> JobConfig:
    limits = {"start": 5, "step": 0.5, "save": 5, "evaluation": 5}
    return JobConfig.model_validate({"limits": limits, **options})


def test_all_ranks_get_torchruns_environment_and_a_log_each(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = "RANK LOCAL_RANK GROUP_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
    job.write_rank(f"""
print({{name: os.environ[name] for name in {names!r}.split()}})
print("secrets", [name for name in os.environ if "TOKEN" in name or "CONTROLLER" in name])
assert os.getpgid(0) == os.getsid(0) == os.getpid()
train(3)
""")
    assert job.launch(nproc=2) == 0
    for rank in (0, 1):
        log = job.log(0, rank)
        assert f"'RANK': '{rank}', 'LOCAL_RANK': '{rank}', 'GROUP_RANK': '0'" in log
        assert "'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1'" in log
        assert f"'OMP_NUM_THREADS': '{max(1, len(os.sched_getaffinity(0)) // 2)}'" in log
        assert "secrets []" in log
    assert [entry["event"] for entry in job.events] == ["finished"]


def test_a_users_thread_count_is_kept(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    job.write_rank("print('threads', os.environ['OMP_NUM_THREADS'])")
    assert job.launch(nproc=1) == 0
    assert "threads 7" in job.log(0, 0)


def test_a_killed_rank_is_seen_and_all_ranks_start_again(job: Any, pace: Any) -> None:
    job.write_rank("""
def die(step):
    if attempt == 0 and rank == 1 and step == 5:
        note("died")
        os.kill(os.getpid(), signal.SIGKILL)
train(20 if attempt else 10**6, at=die)
""")
    assert job.launch(nproc=2) == 0
    died, _ = job.noted("died", 0, 1)
    [fault], [restarted] = job.named("fault"), job.named("restarted")
    again = max(job.noted("started", 1, rank)[0] for rank in (0, 1))
    print(f"seen and all ended after {fault['monotonic'] - died:.3f} s, ranks run again after {again - died:.3f} s")
    assert pace.between(died, fault["monotonic"]) < P1_SEEN_S
    assert fault["rank"] == 1
    assert fault["step"] == 5
    assert fault["attempt"] == 0
    assert "rank 1 on host" in fault["cause"]
    assert "killed by SIGKILL at step 5" in fault["cause"]
    assert restarted["attempt"] == 1
    assert any("killed by SIGKILL" in line for line in job.said)


def test_a_rank_that_crashes_is_named_by_its_signal(job: Any) -> None:
    job.write_rank("""
def crash(step):
    if attempt < 2 and rank == 1 and step == 3 + attempt:
        os.abort() if attempt else os.kill(os.getpid(), signal.SIGSEGV)
train(20 if attempt == 2 else 10**6, at=crash)
""")
    assert job.launch(nproc=2) == 0
    causes = [fault["cause"] for fault in job.named("fault")]
    for cause, name, step in zip(causes, ("SIGSEGV", "SIGABRT"), (3, 4), strict=True):
        assert f"killed by {name} at step {step}" in cause


def test_a_stopped_rank_is_named_with_its_phase_and_step(job: Any, pace: Any) -> None:
    job.write_rank("""
def hang(step):
    if attempt == 0 and step == 4:
        if rank == 1:
            note("hung")
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)  # As one that waits for its peer in a collective.
train(20, at=hang)
""")
    assert job.launch(nproc=2, job=short_limits()) == 0
    hung, _ = job.noted("hung", 0, 1)
    [fault] = job.named("fault")
    print(f"seen {fault['monotonic'] - hung - 0.5:.2f} s after its limit")
    assert pace.between(hung, fault["monotonic"]) < 0.5 + P2_MARGIN_S
    assert fault["rank"] == 1
    assert fault["step"] == 4
    assert "hangs in phase step at step 4" in fault["cause"]
    assert "stopped" in fault["cause"]
    # Where each rank stood is in its log.
    assert "in hang" in job.log(0, 0)
    assert "in hang" in job.log(0, 1)


@pytest.mark.parametrize("culprit", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_of_two_nodes_the_stopped_rank_is_named_and_not_the_one_that_waits(
    job: Any, machines: Callable[..., Any], culprit: int
) -> None:
    job.write_rank(f"""
def hang(step):
    if attempt == 0 and step == 4:
        if rank == {culprit}:
            time.sleep(0.2)  # The other node is silent for longer, and reports first.
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
train(20, at=hang)
""")
    placer = machines("ab", (2,))
    assert job.launch(nproc=1, job=short_limits(nodes=2), placer=placer) == 0
    [fault] = job.named("fault")
    assert fault["rank"] == culprit
    assert "its process is stopped" in fault["cause"]
    assert all("in hang" in job.log(0, rank) for rank in (0, 1))


def test_a_rank_that_holds_the_gil_is_seen(job: Any) -> None:
    job.write_rank("""
def hold(step):
    if attempt == 0 and step == 3:
        page.beat(step, "evaluation" if rank == 1 else "step")
        sum(range(10**13)) if rank == 1 else train(10**6, first=4)
train(20, at=hold)
""")
    limits = {"start": 5, "step": 5, "save": 5, "evaluation": 0.5}
    assert job.launch(nproc=2, job=JobConfig.model_validate({"limits": limits})) == 0
    [fault] = job.named("fault")
    assert fault["rank"] == 1
    assert "phase evaluation at step 3" in fault["cause"]
    assert "in hold" in job.log(0, 1)


def test_a_killed_agent_takes_its_ranks_along_and_is_replaced(job: Any, pace: Any) -> None:
    job.write_rank("""
import subprocess
if attempt == 0:
    # A child in a session of its own, which neither the parent's death nor its group reaches.
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
def kill(step):
    if attempt == 0 and rank == 0 and step == 5:
        note("killed")
        os.kill(os.getppid(), signal.SIGKILL)
train(20 if attempt else 10**6, at=kill)
""")
    assert job.launch(nproc=2) == 0
    killed, _ = job.noted("killed", 0, 0)
    [fault] = job.named("fault")
    again, _ = job.noted("started", 1, 0)
    print(f"seen after {fault['monotonic'] - killed:.3f} s, ranks run again after {again - killed:.3f} s")
    assert pace.between(killed, fault["monotonic"]) < P1_SEEN_S
    assert "agent on host" in fault["cause"]
    assert fault["rank"] is None


def test_a_silent_agent_is_replaced(job: Any) -> None:
    job.write_rank("""
def stop_agent(step):
    if attempt == 0 and rank == 0 and step == 5:
        os.kill(os.getppid(), signal.SIGSTOP)
train(20 if attempt else 10**6, at=stop_agent)
""")
    assert job.launch(nproc=2, silence_s=1.5) == 0
    [fault] = job.named("fault")
    assert "agent on host" in fault["cause"]
    assert "nothing was heard" in fault["cause"]


def test_a_killed_controller_leaves_no_process(job: Any, wait_for: Any, pace: Any) -> None:
    job.write_rank("train(10**6)")
    controller = job.start()
    job.noted("started", 0, 1)
    agent = int(Path(f"/proc/{job.noted('started', 0, 0)[1]}/stat").read_text().rpartition(")")[2].split()[1])
    controller.kill()
    controller.wait()
    killed = time.monotonic()
    print(f"ranks gone after {job.wait_until_gone(60):.3f} s")
    wait_for(lambda: not job.is_alive(agent), 60)
    assert pace.between(killed, time.monotonic()) < P2_MARGIN_S, "seen by silence alone"


def test_a_rank_that_leaves_early_is_an_error(job: Any) -> None:
    job.write_rank("""
if attempt == 0 and rank == 1:
    train(3)
    sys.exit(0)
train(20 if attempt else 10**6)
""")
    assert job.launch(nproc=2, exit_grace_s=0.5) == 0
    [fault] = job.named("fault")
    assert fault["rank"] == 1
    assert fault["step"] == 3
    assert "exited with 0 at step 3 while other ranks continued" in fault["cause"]


def test_a_rank_may_finish_its_save_after_the_others_left(job: Any) -> None:
    job.write_rank("""
train(3)
if rank == 0:
    page.beat(3, "stopping")
    time.sleep(0.8)
""")
    assert job.launch(nproc=2, exit_grace_s=0.2) == 0
    assert not job.named("fault")


def test_an_early_exit_is_blamed_and_not_what_it_leads_to(job: Any) -> None:
    job.write_rank("""
train(3)
if rank == 0:
    train(15, first=4)
    raise ConnectionError("connection closed by peer")
""")
    assert job.launch(nproc=2, job=JobConfig(max_failures=0)) == 1
    [fault] = job.named("fault")
    assert fault["rank"] == 1
    assert "connection closed by peer" in fault["cause"]


def test_a_users_mistake_is_not_retried(job: Any) -> None:
    job.write_rank("print('the key lerning_rate is unknown', file=sys.stderr); sys.exit(2)")
    assert job.launch(nproc=2) == 2
    assert not job.named("restarted")
    assert any("lerning_rate is unknown" in line for line in job.said)


def test_the_same_exception_at_the_same_step_twice_ends_the_run(job: Any) -> None:
    job.write_rank("""
def fail(step):
    if rank == 1 and step == 5:
        try:
            open(f"/nowhere/{os.getpid()}")
        except OSError as error:
            raise ValueError(f"no data for {os.getpid()}") from error
train(10**6, at=fail)
""")
    assert job.launch(nproc=2, job=JobConfig(max_failures=10)) == 1
    assert len(job.named("fault")) == 2
    assert len(job.named("restarted")) == 1
    assert job.named("fault")[0]["cause"].endswith("at step 5")
    [shown] = [text for text in job.said if text.startswith("Traceback")]
    assert "FileNotFoundError" in shown
    assert "ValueError: no data for" in shown


def test_the_budget_ends_and_is_fresh_after_a_new_checkpoint(job: Any) -> None:
    job.write_rank("""
def die(step):
    if rank == 0 and step == 3:
        if attempt == 1:
            publish(3)
        os.kill(os.getpid(), signal.SIGSEGV)
train(10**6, at=die)
""")
    assert job.launch(nproc=1, job=JobConfig(max_failures=1)) == 1
    # Attempt 0 uses the budget up, attempt 1 saves and so gets another, attempt 2 is one too many.
    assert [fault["attempt"] for fault in job.named("fault")] == [0, 1, 2]
    assert "max_failures: 1" in job.named("failed")[0]["cause"]


@pytest.fixture
def _terminal() -> Iterator[None]:
    """A process with a terminal: one that was started by nohup ignores its end."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_makes_the_ranks_save_and_exit(job: Any, number: signal.Signals) -> None:
    job.write_rank(f"""
def ask(step):
    if rank == 0 and step == 5:
        os.kill({os.getpid()}, {int(number)})
train(10**6, at=ask)
""")
    before = signal.getsignal(number)
    assert job.launch(nproc=2) == 75
    assert [entry["event"] for entry in job.events] == ["stopped"]
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("_terminal")
def test_the_end_of_the_terminal_twice_is_one_request(job: Any) -> None:
    job.write_rank(f"""
def ask(step):
    if rank == 0 and step in (5, 15):
        time.sleep(0.2)
        os.kill({os.getpid()}, signal.SIGHUP)
for step in range(1, 20):
    page.beat(step, "step")
    ask(step)
    time.sleep(0.02)
page.beat(20, "stopping")
sys.exit(75)
""")
    assert job.launch(nproc=1) == 75
    [stopped] = job.named("stopped")
    assert stopped["step"] == 20


def test_under_nohup_the_run_outlives_its_terminal(job: Any) -> None:
    job.write_rank("note('ready')\ntrain(100)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        controller = job.start(nproc=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    job.noted("ready", 0, 0)
    controller.send_signal(signal.SIGHUP)
    assert controller.wait(timeout=60) == 0


@pytest.mark.parametrize(("saved", "code"), [(True, 75), (False, 1)])
def test_a_second_signal_ends_ranks_that_do_not_listen(job: Any, saved: bool, code: int) -> None:
    job.write_rank(f"""
if {saved}:
    publish(7)
page.beat(9, "step")
note("ready")
time.sleep(1000)
""")
    controller = job.start()
    for rank in (0, 1):
        job.noted("ready", 0, rank)
    controller.send_signal(signal.SIGINT)
    time.sleep(0.25)
    assert controller.poll() is None
    controller.send_signal(signal.SIGINT)
    assert controller.wait(timeout=60) == code


def test_a_later_start_keeps_the_earlier_logs(job: Any) -> None:
    job.write_rank("print('attempt', attempt)")
    assert job.launch(nproc=1) == 0
    assert job.launch(nproc=1) == 0
    assert "attempt 0" in job.log(0, 0)
    assert "attempt 1" in job.log(1, 0)


def test_a_module_that_does_not_exist_fails_with_its_message(job: Any) -> None:
    assert job.launch(nproc=1, job=JobConfig(max_failures=0)) == 1
    assert any("No module named tiny_rank" in line for line in job.said)
