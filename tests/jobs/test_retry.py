"""When a run is started again."""

from __future__ import annotations

import pytest

from bigtrain.jobs.causes import (
    BACKOFF_MOST_S,
    Fault,
    Kind,
    RetryBudget,
    fault_of_exit,
    fault_of_hang,
)
from bigtrain.jobs.ranks import last_traceback

KILLED = Fault(Kind.SIGNAL, "killed", "host", 0, 3)


def raised(step: int, text: str) -> Fault:
    return Fault(Kind.EXCEPTION, text, "host", 0, step, f"Traceback (most recent call last):\n{text}")


def test_the_first_restart_is_immediate_and_later_ones_wait_longer_and_longer() -> None:
    budget = RetryBudget(10, lambda: 0)
    assert [budget.judge(KILLED).delay_s for _ in range(8)] == [0, 1, 2, 4, 8, 16, BACKOFF_MOST_S, BACKOFF_MOST_S]


def test_progress_makes_budget_and_backoff_fresh() -> None:
    saved = [0]
    budget = RetryBudget(2, lambda: saved[0])
    assert [budget.judge(KILLED).delay_s for _ in range(2)] == [0, 1]
    saved[0] = 100
    assert [budget.judge(KILLED).retry for _ in range(3)] == [True, True, False]


def test_a_checkpoint_from_before_the_start_is_no_progress() -> None:
    budget = RetryBudget(1, lambda: 500)
    assert [budget.judge(KILLED).retry for _ in range(2)] == [True, False]


def test_the_same_exception_at_the_same_step_is_tried_once_more_and_no_further() -> None:
    budget = RetryBudget(10, lambda: 0)
    assert budget.judge(raised(7, "ValueError: at 0x7f001 in process 12")).retry
    assert budget.judge(raised(8, "ValueError: at 0x7f001 in process 12")).retry
    assert budget.judge(raised(7, "KeyError: 'x'")).retry
    verdict = budget.judge(raised(7, "ValueError: at 0x7f999 in process 13"))
    assert not verdict.retry
    assert "twice at step 7" in verdict.reason


@pytest.mark.parametrize(
    "text",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: 8 bytes",
        "MemoryError",
    ],
)
def test_out_of_memory_is_named_with_a_hint_and_not_tried_a_third_time(text: str) -> None:
    exited = {"rank": 1, "phase": "step", "code": 1, "signal": None, "tail": "", "traceback": f"Traceback\n{text}"}
    first, second = (fault_of_exit({**exited, "step": step}, "x") for step in (7, 9))
    assert first.cause.startswith("rank 1 on host x ran out of memory (lower layout.micro_size")
    budget = RetryBudget(10, lambda: 0)
    assert budget.judge(first).retry
    verdict = budget.judge(second)
    assert (verdict.retry, verdict.reason) == (False, "memory ran out twice at step 9")


def test_a_port_taken_by_another_process_is_named_and_tried_again() -> None:
    text = "DistNetworkError: The server socket has failed to listen. port: {}, name: EADDRINUSE, message: in use"
    exited = {"rank": 0, "step": 0, "phase": "start", "code": 1, "signal": None, "tail": ""}
    budget = RetryBudget(10, lambda: 0)
    for port in (23456, 23457):
        fault = fault_of_exit({**exited, "traceback": f"Traceback\n{text.format(port)}"}, "x")
        assert fault.cause.startswith("rank 0 on host x could not listen on its port, which is in use: ")
        assert f"port: {port}" in fault.cause
        assert budget.judge(fault).retry


def test_a_users_mistake_is_never_retried() -> None:
    assert not RetryBudget(10, lambda: 0).judge(Fault(Kind.USER, "typo", "host")).retry


def test_causes_name_rank_host_phase_and_step() -> None:
    exited = {"rank": 1, "step": 41, "phase": "step", "code": None, "signal": 9, "traceback": None, "tail": ""}
    assert fault_of_exit(exited, "x").cause == "rank 1 on host x was killed by SIGKILL at step 41"
    exited |= {"phase": "save", "signal": None, "code": 1, "traceback": "Traceback\n  a\nValueError: no"}
    assert fault_of_exit(exited, "x").cause == "rank 1 on host x raised ValueError: no at step 41, in phase save"
    exited |= {"traceback": None, "tail": "loading\nerror: shard-000000.tar is cut short\n  where: x\n"}
    fault = fault_of_exit(exited, "x")
    assert fault.cause == "rank 1 on host x reported: shard-000000.tar is cut short at step 41, in phase save"
    assert fault.signature() == fault_of_exit(exited, "y").signature() is not None, "not tried a third time"
    hung = {"rank": 0, "step": 3, "phase": "data", "age_s": 301.2, "limit_s": 300.0, "stopped": False, "stacks": ""}
    assert (
        fault_of_hang(hung, "x").cause
        == "rank 0 on host x hangs in phase data at step 3: no heartbeat for 301 s (limit 300 s)"
    )


def test_a_traceback_is_shown_with_what_it_was_raised_from_and_nothing_earlier() -> None:
    head = "Traceback (most recent call last):\n"
    chained = (
        f"{head}  one\nOSError: gone\n\nThe above exception was the direct cause of the following exception:\n\n"
        f"{head}  two\nValueError: no data"
    )
    log = f"step 1\n{head}  old\nKeyError: caught\nstep 2\n{chained}\n"
    assert last_traceback(log) == chained
    assert last_traceback("step 1\nstep 2\n") is None
