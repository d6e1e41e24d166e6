"""Child processes run this source and nothing of the working directory; each variable has one home."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bigtrain as package
from bigtrain import variables
from bigtrain.children import module_command, with_source

PACKAGE = Path(package.__file__).parent
SHADOWS = ("random", "queue", "logging", "torch", "wandb", "yaml")
SENT_AS_TEXT = PACKAGE / "jobs" / "cluster" / "end_driver.py"
"""Imports nothing of the package, so it repeats a name."""


def shadow(place: Path) -> None:
    """Modules of the user's own that leave a mark when they are imported."""
    for name in SHADOWS:
        (place / f"{name}.py").write_text(f"open({str(place / f'{name}.imported')!r}, 'w').close()\n")


def imported(place: Path) -> list[str]:
    return sorted(path.stem for path in place.glob("*.imported"))


def test_a_child_imports_no_module_of_the_working_directory(tmp_path: Path) -> None:
    shadow(tmp_path)
    environment = with_source({**os.environ, "PYTHONPATH": f":{tmp_path / 'mine'}:"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "child.py").write_text("import bigtrain, random, queue, yaml; print(bigtrain.__file__)\n")
    for command in (module_command("child"), [*module_command("bigtrain"), "--version"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"bigtrain {package.__version__}"
    assert not imported(tmp_path)


def test_python_m_bigtrain_is_the_command(tmp_path: Path) -> None:
    shadow(tmp_path)
    command = [sys.executable, "-m", "bigtrain", "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, env=with_source(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"bigtrain {package.__version__}"
    assert not imported(tmp_path)


@pytest.mark.slow
def test_a_run_beside_modules_of_the_same_names_as_installed_ones_finishes(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(duration="2 steps", tracking={"wandb": "offline"})
    shadow(tmp_path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bigtrain", "train", str(config)],
        cwd=tmp_path, env=with_source(os.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny" / "wandb").is_dir()
    assert not imported(tmp_path)


def test_names_of_environment_variables_stand_in_one_module() -> None:
    known = {value for name, value in vars(variables).items() if name.isupper()}
    assert len(known) == sum(name.isupper() for name in vars(variables))
    repeated = {
        (path.name, node.value)
        for path in PACKAGE.rglob("*.py")
        if path not in (PACKAGE / "variables.py", SENT_AS_TEXT)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in known
    }
    assert not repeated
