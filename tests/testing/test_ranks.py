"""The pool of ranks itself: right results, failures that neither hang nor linger, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bigtrain.testing.ranks import RankError, RankPool

PROMPT_S = 20.0
"""Far below the limit that a run has, far above what a failure needs to be noticed."""


@dataclass(frozen=True)
class Parcel:
    """A class of this module, as an argument and as a result."""

    values: list[float]


def gather(parcel: Parcel) -> Parcel:
    total = torch.tensor(parcel.values) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return Parcel([*total.tolist(), dist.get_rank()])


def lay_a_mesh_and_leave_it() -> tuple[int, ...]:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))
    total = torch.ones(())
    dist.all_reduce(total, group=mesh["b"].get_group())
    return (int(total), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def own_pid() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise LookupError("the dog ate it")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def dawdle_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(3600)


def return_what_cannot_be_sent() -> object:
    return lambda: None


def processes_of(pool: RankPool) -> list[psutil.Process]:
    nursery = pool._nursery
    assert nursery is not None
    return [psutil.Process(nursery.pid), *psutil.Process(nursery.pid).children(recursive=True)]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4, timeout_s=60.0) as pool:
        yield pool


def test_results_come_back_by_rank_from_a_group_of_just_these_ranks(pool: RankPool) -> None:
    for size in (1, 4, 2, 3, 2):
        parcels = pool.run(gather, Parcel([1.0, 2.0]), ranks=size)
        total = size * (size + 1) / 2
        assert parcels == [Parcel([total, 2 * total, float(rank)]) for rank in range(size)]


def test_a_mesh_of_one_run_does_not_reach_the_next(pool: RankPool) -> None:
    assert pool.run(lay_a_mesh_and_leave_it, ranks=4) == [(2, rank, 4) for rank in range(4)]
    assert pool.run(lay_a_mesh_and_leave_it, ranks=2) == [(1, rank, 2) for rank in range(2)]
    assert pool.run(lay_a_mesh_and_leave_it, ranks=4) == [(2, rank, 4) for rank in range(4)]


def test_ranks_stay_warm(pool: RankPool) -> None:
    assert pool.run(own_pid, ranks=4) == pool.run(own_pid, ranks=4)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_exception_on_one_rank_ends_the_run_with_its_traceback(pool: RankPool, rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match="the dog ate it") as caught:
        pool.run(fail_on, rank, ranks=3)
    assert time.monotonic() - began < PROMPT_S
    assert caught.value.rank == rank
    assert "in fail_on" in caught.value.report
    assert pool.run(gather, Parcel([1.0]), ranks=2)[0] == Parcel([3.0, 0.0])


def test_a_rank_that_is_killed_is_the_one_named(pool: RankPool) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 "):
        pool.run(die_on, 1, ranks=2)
    assert time.monotonic() - began < PROMPT_S
    assert len(set(pool.run(own_pid, ranks=4))) == 4


def test_a_rank_that_hangs_is_ended_and_shows_where_it_stood(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1 did not return within 1 s") as caught:
        pool.run(dawdle_on, 1, ranks=2, timeout_s=1.0)
    assert "in dawdle_on" in caught.value.report
    assert pool.run(gather, Parcel([1.0]), ranks=2)[0] == Parcel([3.0, 0.0])


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_rank(pool: RankPool) -> None:
    with pytest.raises(RankError, match="return_what_cannot_be_sent"):
        pool.run(return_what_cannot_be_sent, ranks=1)


def test_functions_that_ranks_cannot_find_and_sizes_there_are_not_are_refused(pool: RankPool) -> None:
    with pytest.raises(ValueError, match="top level"):
        pool.run(lambda: None)
    with pytest.raises(ValueError, match="1 to 4, not 5"):
        pool.run(own_pid, ranks=5)


@pytest.mark.slow
def test_nothing_is_left_of_a_pool_that_is_closed() -> None:
    with RankPool(2) as pool:
        pool.run(own_pid)
        processes, directory = processes_of(pool), pool._directory
        assert len(processes) == 3
        assert directory is not None
        assert directory.exists()
    assert not any(process.is_running() for process in processes)
    assert not directory.exists()


@pytest.mark.slow
def test_no_rank_outlives_a_process_that_is_killed_with_its_pool(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import os\n\n\ndef pid():\n    return os.getpid()\n")
    script = tmp_path / "user.py"
    script.write_text(
        "import sys\n"
        "import own\n"
        "from bigtrain.testing.ranks import RankPool\n"
        "pool = RankPool(2)\n"
        "print(*pool.run(own.pid), pool._nursery.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    process.kill()
    process.communicate()
    gone, left = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=PROMPT_S)
    assert not left, gone
    assert not list(tmp_path.glob("bigtrain-ranks-*"))


def test_directories_of_pools_are_in_the_temporary_directory(pool: RankPool) -> None:
    pool.run(own_pid, ranks=1)
    assert pool._directory is not None
    assert pool._directory.parent == Path(tempfile.gettempdir())
    assert pool._directory.stat().st_mode & 0o077 == 0
