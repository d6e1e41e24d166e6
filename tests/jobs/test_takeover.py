"""A run whose launcher on another machine may be dead."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from bigtrain import storage
from bigtrain.config import UserError
from bigtrain.jobs.takeover import OVERDUE_S, outlast
from bigtrain.run import LEASE_LIFE_S, Lease, LeaseHolder, RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "tiny")


def held_elsewhere(directory: RunDirectory, age_s: float) -> None:
    """The lease as a process of another machine renewed it some seconds ago."""
    holder = LeaseHolder(1, "elsewhere", "its boot", 7, 0, time.time() - age_s)
    directory.path.mkdir(exist_ok=True)
    storage.write_json(directory.lease, vars(holder))


def test_a_lease_that_is_not_renewed_is_waited_for_and_the_wait_is_reported(directory: RunDirectory) -> None:
    said: list[str] = []
    assert not outlast(directory, said.append)
    held_elsewhere(directory, LEASE_LIFE_S - 0.4)
    assert outlast(directory, said.append)
    assert len(said) == 1
    assert "process 7 on elsewhere holds 'tiny'" in said[0]
    assert Lease.acquire(directory).predecessor is not None


def test_a_holder_who_renews_or_lives_here_is_not_waited_for(directory: RunDirectory) -> None:
    held_elsewhere(directory, OVERDUE_S - 0.4)  # Late, and it is not said yet that it may be dead.
    renewal = threading.Timer(0.2, held_elsewhere, (directory, 0.0))
    renewal.start()
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
        outlast(directory, pytest.fail)
    renewal.join()
    directory.lease.unlink()
    Lease.acquire(directory)
    with pytest.raises(UserError, match="in use by process"):
        outlast(directory, pytest.fail)
