"""The shared page between a rank and its agent."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain import variables
from bigtrain.heartbeat import ANSWERED, PHASES, Control, Heartbeat, HeartbeatPage

ROOT = Path(__file__).resolve().parents[2]
TICK_S = 2**24 / 1e9
"""Of the page's clock."""
BEAT_OVER_CLOCK = 40.0
"""Processor time of a beat over that of a look at the clock, 0.05 microseconds here: 6 as it is."""


def rank_side(page: HeartbeatPage) -> Heartbeat:
    return Heartbeat.from_environment({variables.PAGE: str(page.descriptor)})


def test_a_beat_is_read_as_it_was_written() -> None:
    with HeartbeatPage() as page:
        assert page.read()[:2] == (0, "start")
        rank = rank_side(page)
        for step, phase in enumerate(PHASES, start=2**31):
            rank.beat(step, phase)
            began = time.monotonic()
            beat = page.read()
            assert (beat.step, beat.phase) == (step, phase)
            assert 0 <= beat.age_s <= time.monotonic() - began + TICK_S


def test_the_age_grows_without_the_rank() -> None:
    with HeartbeatPage() as page:
        began = time.monotonic()
        rank_side(page).beat(1, "save")
        time.sleep(0.2)
        assert 0.17 < page.read().age_s <= time.monotonic() - began + TICK_S


def test_the_age_survives_the_wrap_of_its_clock() -> None:
    with HeartbeatPage() as page:
        rank = rank_side(page)
        rank.beat(3, "step")
        # As if the beat had come 100 ticks before the counter started again from 0 and now it were past it.
        began = time.monotonic()
        ticks_now = (time.monotonic_ns() >> 24) & (1 << 28) - 1
        rank._words[0] = rank._words[0] & ~((1 << 28) - 1) | (ticks_now - 100) % (1 << 28)
        assert 100 * TICK_S <= page.read().age_s <= 100 * TICK_S + time.monotonic() - began + TICK_S


def test_the_control_word_reaches_the_rank() -> None:
    with HeartbeatPage() as page:
        rank = rank_side(page)
        assert rank.control() is Control.RUN
        for control in (Control.STOP, Control.SAVE, Control.RUN):
            page.set_control(control)
            assert rank.control() is control


def test_no_reader_sees_half_a_beat() -> None:
    """Each step has its own phase; a reading that mixed two beats would pair them wrongly."""
    began = time.monotonic()
    with HeartbeatPage() as page:
        script = (
            "from bigtrain.heartbeat import Heartbeat, PHASES\n"
            "page = Heartbeat.from_environment()\n"
            "for step in range(400_000): page.beat(step * 65_537 % 2**32, PHASES[step * 65_537 % 2**32 % 6])\n"
        )
        environment = os.environ | {variables.PAGE: str(page.descriptor), "PYTHONPATH": str(ROOT)}
        writer = subprocess.Popen([sys.executable, "-c", script], env=environment, pass_fds=(page.descriptor,))
        seen = set()
        while writer.poll() is None:
            for _ in range(1000):
                beat = page.read()
                assert beat.phase == PHASES[beat.step % 6]
                assert beat.age_s <= time.monotonic() - began + TICK_S
                seen.add(beat.step)
        assert writer.returncode == 0
        assert len(seen) > 100


def test_several_threads_may_beat() -> None:
    with HeartbeatPage() as page:
        rank = rank_side(page)
        threads = [
            threading.Thread(target=lambda n=n: [rank.beat(n, PHASES[n]) for _ in range(20_000)]) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            beat = page.read()
            assert beat.phase == PHASES[beat.step]


def cpu_per_call_s(call: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(10_000):
        call()
    return (time.thread_time() - start) / 10_000


def test_a_beat_costs_less_than_five_microseconds() -> None:
    """... as a ratio, taken in turns, that neither load nor a slow machine changes."""
    with HeartbeatPage() as page:
        rank = rank_side(page)
        times = [(cpu_per_call_s(lambda: rank.beat(1, "step")), cpu_per_call_s(time.monotonic_ns)) for _ in range(5)]
        beat_s, clock_s = (min(column) for column in zip(*times, strict=True))
        print(f"a beat costs {beat_s * 1e6:.2f} microseconds, {beat_s / clock_s:.1f} times a look at the clock")
        assert beat_s / clock_s < BEAT_OVER_CLOCK


def test_without_an_agent_the_page_has_no_effect() -> None:
    rank = Heartbeat.from_environment({})
    rank.beat(5, "step")
    assert rank.control() is Control.RUN


def test_a_file_that_happens_to_have_the_number_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"x" * 64)
    with open(path, "r+b") as file:
        Heartbeat.from_environment({variables.PAGE: str(file.fileno())}).beat(7, "save")
    assert path.read_bytes() == b"x" * 64


def test_the_page_has_no_name_and_cannot_be_resized() -> None:
    with HeartbeatPage() as page:
        assert os.readlink(f"/proc/self/fd/{page.descriptor}").endswith("(deleted)")
        for size in (0, 1 << 20):
            try:
                os.ftruncate(page.descriptor, size)
            except PermissionError:
                continue
            raise AssertionError("the page could be resized")


@pytest.mark.parametrize(("library", "answers"), [("CDLL", True), ("PyDLL", False)], ids=["without", "with the GIL"])
def test_a_rank_whose_main_thread_hangs_shows_its_stacks_and_describes_itself(library: str, answers: bool) -> None:
    script = (
        "import ctypes\n"
        "from bigtrain.heartbeat import install_rank_signals\n"
        "install_rank_signals(lambda: 'collective 7')\n"
        "print('ready', flush=True)\n"
        # As in a collective whose peer is gone: in C, and no signal gets it out.
        f"mutex, libc = ctypes.create_string_buffer(64), ctypes.{library}(None)\n"
        "libc.pthread_mutex_lock(mutex)\n"
        "libc.pthread_mutex_lock(mutex)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.stdout, process.stderr
    assert output is not None
    assert errors is not None
    descriptor = errors.fileno()
    said = b""

    def until(text: bytes, number: signal.Signals) -> None:
        """Ask again and again: a signal that comes while stacks are still being written may go unheard."""
        nonlocal said
        while text not in said:
            assert process.poll() is None, said
            process.send_signal(number)
            if select.select([descriptor], [], [], 0.2)[0]:
                said += os.read(descriptor, 1 << 16)

    try:
        assert output.readline() == b"ready\n"
        until(b"line 7 in <module>", signal.SIGUSR1)
        if answers:
            until(b"collective 7\n", signal.SIGUSR2)
        else:
            process.send_signal(signal.SIGUSR2)
            time.sleep(0.3)
    finally:
        process.kill()
        said += process.communicate()[1]
    assert (ANSWERED.encode() in said) == answers
