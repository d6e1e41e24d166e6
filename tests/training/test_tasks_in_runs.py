"""The evaluator `tasks`: the same scores at every layout, in a run and after it, before and after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigtrain.config import UserError
from bigtrain.data.config import StreamingConfig
from bigtrain.data.streaming.store import open_index
from bigtrain.parallel.mesh import Ranks
from bigtrain.run import ExitCode, load_config
from bigtrain.storage import read_lines
from bigtrain.testing.ranks import RankPool
from bigtrain.training.evaluators.tasks import TasksConfig

SAME = 1e-5
"""Absolute, of bits per byte in FP32 between layouts."""
REQUESTS = [
    {"context": "import ", "continuations": ["os", "the sea", "heapq"], "gold": 0, "task": "words"},
    {"context": "", "continuations": ["def", "xyz"], "gold": 1, "task": "words"},
    {"context": "for one in ", "continuations": ["many:", "a"], "gold": 0, "task": "loops"},
    {"context": "while True" * 5, "continuations": [":", "!"], "gold": 0, "task": "loops"},
    {"context": "return", "continuations": [" self", " nothing at all"], "gold": 0, "task": "loops"},
]
MEASURES = ("accuracy", "accuracy_per_character", "accuracy_per_byte", "bits_per_byte")
NAMES = {f"val_task/{task}/{measure}" for task in ("words", "loops") for measure in MEASURES}
LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2, "micro_size": 2}}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, REQUESTS)))
    return file


def evaluated(config_path: str) -> dict[str, float | None]:
    """One evaluation of the initial weights by the config's evaluators, without held-out data."""
    from bigtrain.training.evaluation import Evaluation
    from bigtrain.training.prepare import pass_context

    config = load_config(Path(config_path))
    index = open_index(next(iter(config.data.places("train").values())), config.streaming)
    engine = config.engine.build(
        config.model, index.vocab_size, config.optimizer, layout=config.layout, precision=config.precision,
        seed=config.seed, ranks=Ranks.from_environment(),
    )  # fmt: skip
    context = pass_context(config, engine, config.batch.size.sequences(config.model.context), index)
    evaluation = Evaluation(engine, config.evaluation.evaluators, {}, print, context)
    first, second = evaluation.run(), evaluation.run()
    engine.close()
    assert first == second
    assert first.units["val_task/words/bits_per_byte"] == "bits per byte"
    return first.values


@pytest.mark.slow
def test_layouts_score_tasks_as_one_process_does(
    write_config: Callable[..., Path], tasks: Path, tmp_path: Path, ranks: RankPool
) -> None:
    path = write_config(evaluation={"evaluators": [{"name": "tasks", "files": [str(tasks)]}]})
    [alone] = ranks.run(evaluated, str(path), ranks=1)
    assert alone.keys() == NAMES
    for layout, keys in LAYOUTS.items():
        other = tmp_path / f"{layout}.yaml"
        other.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "layout": keys}))
        for values in ranks.run(evaluated, str(other), ranks=2):
            assert values == pytest.approx(alone, abs=SAME), layout


@pytest.mark.slow
def test_a_run_with_tasks_resumes_to_the_bit_and_evaluate_gives_its_last_scores(
    write_config: Callable[..., Path], bigtrain: Callable[..., Any], tasks: Path, text_shards: Path, tmp_path: Path
) -> None:
    config = write_config(
        data={"train": str(text_shards / "train")},
        evaluation={"every": "2 steps", "evaluators": [{"name": "tasks", "files": [str(tasks)]}]},
        checkpoint={"every": "2 steps", "best": {"metric": "val_task/loops/bits_per_byte"}},
    )
    rows = {}
    for name, durations in (("whole", [6]), ("resumed", [2, 6])):
        for steps in durations:
            done = bigtrain("train", config, "--nproc", 2, "--name", name, f"duration={steps} steps")
            assert done.returncode == ExitCode.FINISHED, done.stderr
        logged = read_lines(tmp_path / "runs" / name / "metrics.jsonl")
        rows[name] = [{key: row.get(key) for key in ("step", "loss", *sorted(NAMES))} for row in logged]
    assert rows["resumed"] == rows["whole"]
    scored = [row for row in rows["whole"] if row["val_task/words/accuracy"] is not None]
    assert [row["step"] for row in scored] == [2, 4, 6]
    validation = text_shards / "validation"
    done = bigtrain("evaluate", "whole@6", "--data", validation, "--tasks", tasks, "--batches", 1, "--json")
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["checkpoints"]
    for name in NAMES:
        _, task, measure = name.split("/")
        assert row["sets"][f"task {task}"][measure] == pytest.approx(scored[-1][name], abs=SAME)


def test_tasks_that_cannot_be_scored_are_refused_before_a_process_starts(text_shards: Path, tmp_path: Path) -> None:
    index = open_index(str(text_shards / "train"), StreamingConfig())
    with pytest.raises(UserError, match="cannot be read"):
        TasksConfig(files=(str(tmp_path / "absent.jsonl"),)).check(index)
    with pytest.raises(ValueError, match="is a URL"):
        TasksConfig(files=("s3://bucket/requests.jsonl",))
