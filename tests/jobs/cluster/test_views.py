"""Which submission of a run is shown: without a cluster, by a stand-in for the answers of its dashboard."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.jobs.cluster.dashboard import RayJob
from bigtrain.jobs.cluster.views import NAME_KEY, cluster_view


class Answers:
    """The dashboard of a cluster with some submissions, each with its driver's board."""

    url = "http://127.0.0.1:1"

    def __init__(self, **boards: dict[str, Any]) -> None:
        self._boards = {name.replace("_", "-"): board for name, board in boards.items()}

    def jobs(self) -> list[RayJob]:
        return [self.job(id) for id in self._boards]

    def job(self, id: str) -> RayJob:
        status = self._boards[id].get("job", "SUCCEEDED")
        value = {"submission_id": id, "status": status, "message": "", "driver_node_id": "n"}
        return RayJob.parse({**value, "metadata": {NAME_KEY: id.rpartition("-")[0]}, "driver_exit_code": 0})

    def file(self, node: str, name: str) -> bytes:
        return json.dumps(self._boards[name.split("/")[1]]).encode()


DONE = {"times": {"placing": 1.0}, "exit_code": 0, "status": {"name": "a", "state": "finished", "step": 7, "loss": 2.5}}
REFUSED = {"times": {"submitted": 2.0}, "exit_code": 2, "error": {"error": "the data is another"}, "status": None}
NOTHING = {"times": {"submitted": 3.0}, "exit_code": 0, "error": None, "status": None}
RUNNING = {"job": "RUNNING", "times": {"submitted": 4.0}, "exit_code": None, "status": None}


def shown(**boards: dict[str, Any]) -> dict[str, Any]:
    return cluster_view(Answers(**boards), "a").status()  # type: ignore[arg-type]


def test_a_refused_submission_hides_no_finished_run() -> None:
    status = shown(a_0=DONE, a_1=REFUSED)
    assert (status["state"], status["step"], status["submission"]) == ("finished", 7, "a-0")
    assert status["refused"] == {"submission": "a-1", "error": "the data is another"}


def test_one_with_nothing_to_do_hides_none_either() -> None:
    assert shown(a_0=DONE, a_1=REFUSED, a_2=NOTHING)["submission"] == "a-0"


def test_one_that_is_under_way_is_shown() -> None:
    status = shown(a_0=DONE, a_1=RUNNING)
    assert (status["state"], status["submission"], status["refused"]) == ("pending", "a-1", None)


def test_of_submissions_that_were_all_refused_the_newest_is_shown() -> None:
    assert shown(a_0=REFUSED, a_1=REFUSED)["submission"] == "a-1"


def test_an_earlier_submission_is_found_by_its_number_or_id() -> None:
    view = cluster_view(Answers(a_0=DONE, a_1=REFUSED), "a")  # type: ignore[arg-type]
    assert view.submission("1").job.id == view.submission("a-1").job.id == "a-1"
    with pytest.raises(UserError, match="There is no submission a-7"):
        view.submission("7")
