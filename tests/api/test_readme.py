"""The examples of the API's README, run as they stand, and what they must give."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.children import with_source

README = Path(__file__).parents[2] / "bigtrain" / "api" / "README.md"
RUN_TIMEOUT_S = 300


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def example(word: str) -> str:
    """The one example that has a word."""
    (found,) = [text for text in examples() if word in text]
    return found if "import bigtrain\n" in found else f"import bigtrain\n\n{found}"


def run(code: str, place: Path) -> str:
    (place / "example.py").write_text(code)
    environment = with_source(os.environ) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_shards: Path) -> Path:
    """A folder with shards/ and first.yaml, whose config is that of the first example, with a save each 10 steps."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "shards").symlink_to(text_shards)
    namespace: dict[str, dict[str, object]] = {}
    exec(example("config = {").partition('if __name__ == "__main__"')[0], namespace)
    config = namespace["config"] | {"checkpoint": {"every": "10 steps"}, "optimizer": {"lr": 3e-3}}
    (folder / "first.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_importing_the_package_is_light_and_every_name_is_there() -> None:
    code = "import sys, bigtrain; print(sorted({'torch', 'pydantic', 'ray', 'numpy', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    import bigtrain

    assert all(hasattr(bigtrain, name) for name in bigtrain.__all__)
    assert all(f"`{name}" in README.read_text() for name in bigtrain.__all__ if name[0].islower())


def test_a_data_set_is_read_without_a_run(place: Path) -> None:
    out = run(example("open_data"), place)
    assert int(out.split()[0]) > 8


def test_a_law_is_fitted_to_a_table(place: Path) -> None:
    assert "huber" in run(example("scaling.fit"), place)


@pytest.mark.slow
def test_a_run_is_trained_read_loaded_and_continued(place: Path) -> None:
    out = run(example("config = {"), place).splitlines()
    assert out[0] == "finished [20]"
    losses = eval(out[1])  # noqa: S307 - a list of floats that the example printed
    assert len(losses) > 1
    assert losses[-1] < losses[0]
    assert out[3].startswith("import ")


@pytest.mark.slow
def test_a_loop_of_ones_own_equals_the_command_to_the_bit_and_each_goes_on_from_the_other(place: Path) -> None:
    loop = example("bigtrain.build")
    assert len(loop.splitlines()) <= 25
    run(loop, place)
    train = 'import bigtrain\n\nbigtrain.train("first.yaml", nproc=1, name="{name}", overrides={overrides})\n'
    run(train.format(name="trained", overrides={}), place)
    trained = read_tensors(place / "runs" / "trained" / "checkpoints", 20, prefix="")
    mine = read_tensors(place / "runs" / "mine" / "checkpoints", 20, prefix="")
    assert trained.keys() == mine.keys()
    assert [name for name in mine if not torch.equal(mine[name], trained[name])] == []
    # Each goes on from the other's checkpoint.
    longer = {"duration": "30 steps"}
    run(train.format(name="mine", overrides=longer), place)
    run(loop.replace('name="mine"', 'name="trained", overrides={"duration": "30 steps"}'), place)
    trained = read_tensors(place / "runs" / "trained" / "checkpoints", 30, prefix="")
    mine = read_tensors(place / "runs" / "mine" / "checkpoints", 30, prefix="")
    assert [name for name in mine if not torch.equal(mine[name], trained[name])] == []


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_in_the_background_is_stopped_and_saved(place: Path) -> None:
    # A run that is stopped before its first step has nothing to save.
    begun = "import time\nwhile not run.metrics():\n    time.sleep(0.2)\nrun.stop()"
    code = example("wait=False").replace("run.stop()", begun)
    run(code + '\nassert run.status()["state"] == "stopped"\nassert run.checkpoints()\n', place)
