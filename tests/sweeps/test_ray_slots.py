"""What a slot of a cluster does from trial to trial, with agents of this machine in the place of Ray's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bigtrain.jobs.config import JobConfig
from bigtrain.jobs.launch import run_controlled
from bigtrain.jobs.placers.local import LocalPlacer
from bigtrain.jobs.placing import Notice
from bigtrain.run import ExitCode
from bigtrain.sweeps.gang import KeptPlacer

ROOT = Path(__file__).resolve().parents[2]


class OneMachine(LocalPlacer):
    """An elastic placer without other machines."""

    def distrust(self, agent: str) -> None: ...

    def exclude(self, agent: str) -> bool:
        return False

    def leave(self, agent: str) -> None: ...

    def notices(self) -> list[Notice]:
        return []

    def larger(self) -> int:
        return 0


def test_a_gang_trains_one_run_after_another_and_is_placed_anew_once_dropped(tmp_path: Path) -> None:
    (tmp_path / "tiny_rank.py").write_text(
        "import os, pathlib\npathlib.Path(os.environ['BIGTRAIN_RUN'], 'agent').write_text(str(os.getppid()))\n"
    )
    placer = KeptPlacer(lambda say, event: OneMachine(tmp_path / "agent.log"))
    placed: list[dict[str, Any]] = []

    def record(event: str, /, **fields: Any) -> None:
        if event == "placed":
            placed.append(fields)

    def train(name: str) -> int:
        """The agent's process, which is the parent of the run's rank."""
        run = tmp_path / name
        run.mkdir()
        placer.begin(lambda line: None, record)
        code = run_controlled(
            run, placer, nproc=1, job=JobConfig(), event=record, rank_module="tiny_rank", say=lambda line: None,
            environment={"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        )  # fmt: skip
        assert code == ExitCode.FINISHED
        return int((run / "agent").read_text())

    try:
        first, second = train("a"), train("b")
        assert first == second
        assert [fields["kept"] for fields in placed] == [True]
        placer.drop()
        assert train("c") != first
    finally:
        placer.close()
    assert not Path(f"/proc/{first}").exists()
