"""`bigtrain run`: scripts of a user's own on this machine, beside the launchers that they are written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import UserError
from bigtrain.jobs.environment import parse_environment
from bigtrain.jobs.scripts.call import ScriptCall
from bigtrain.jobs.scripts.launcher import LAUNCHERS, adapt, notes
from tests.in_process import run_here

BINARIES = Path(sys.executable).parent
SHOW = """
import json, os, sys, pathlib
kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LC_CTYPE", "_", "SHLVL")}
shown = {"arguments": sys.argv, "directory": os.getcwd(), "path": sys.path[0], "environment": kept}
pathlib.Path(f"seen_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(shown))
print("rank", os.environ.get("RANK"), "is here")
"""


def execute(directory: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a directory, without the variables of tests that run under a launcher themselves."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | variables
    return subprocess.run(
        [*map(str, words)], cwd=directory, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def bigtrain_run(directory: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return execute(directory, sys.executable, "-m", "bigtrain", "run", *words, **variables)


def seen(directory: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / f"seen_{rank}.json").read_text())
    return found


PORTS_AND_PLACES = (
    "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_MAX_RESTARTS",
    # torchrun's agent serves the store, here rank 0 does.
    "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


def test_a_script_finds_what_torchrun_gives_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "show.py").write_text(SHOW)
    words = ["sub/show.py", "s3://bucket//x", "./out/", "--lr", "1e-3", "a b", "job.nodes=5"]
    by_library = execute(tmp_path, BINARIES / "torchrun", "--nproc-per-node", 2, *words)
    assert by_library.returncode == 0, by_library.stderr
    expected = [seen(tmp_path, rank) for rank in (0, 1)]
    started = bigtrain_run(tmp_path, "--nproc", 2, *words)
    assert started.returncode == 0, started.stderr
    assert "[rank 1] rank 1 is here" in started.stdout
    for rank in (0, 1):
        found, wanted = seen(tmp_path, rank), expected[rank]
        assert {key: found[key] for key in ("arguments", "directory", "path")} == {
            key: wanted[key] for key in ("arguments", "directory", "path")
        }
        for name, value in wanted["environment"].items():
            assert name in found["environment"], name
            if name not in PORTS_AND_PLACES:
                assert found["environment"][name] == value, name
        assert found["environment"]["TORCHELASTIC_RUN_ID"] == "show"
    assert (tmp_path / "runs" / "show" / "events.jsonl").exists()


def test_settings_stand_before_the_script(tmp_path: Path) -> None:
    (tmp_path / "fail.py").write_text(
        "import os, sys\nprint('mine', os.environ['MINE'], os.environ['HOME'])\n"
        "sys.exit(0 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '1' else 4)\n"
    )
    done = bigtrain_run(
        tmp_path, "--nproc", 1, "--name", "f", "--env", "MINE=1 2", "--env", "HOME", "job.max_failures=1", "fail.py",
        HOME="/nowhere",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mine 1 2 /nowhere") == 2
    again = bigtrain_run(tmp_path, "--nproc", 1, "--name", "f", "--env", "MINE=3", "job.max_failures=0", "fail.py")
    assert again.returncode == 1
    assert "job.max_failures: 0" in again.stderr


def test_a_module_and_its_options(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "main.py").write_text("import sys; print('said', sys.argv[1:])")
    done = bigtrain_run(tmp_path, "--module", "pack.main", "--nproc", "7")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "said ['--nproc', '7']\n"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["none.py"], "There is no script none.py"),
        (["job.max_failures=1"], "No script is named"),
        (["job.max_failure=1", "a.py"], "max_failures"),
        (["--launcher", "torchrunn", "a.py"], "Did you mean 'torchrun'"),
        (["--launcher", "torchrun --nnodes 2", "a.py"], "--nnodes is not a known option of torchrun"),
        (["--env", "RANK=1", "a.py"], "the launcher sets RANK itself"),
        (["--env", "MY_API_KEY=1", "a.py"], "looks like a secret"),
    ],
)
def test_a_mistake_is_refused_in_one_line(tmp_path: Path, words: list[str], part: str) -> None:
    (tmp_path / "a.py").touch()
    done = run_here("run", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_variables_of_the_command_line() -> None:
    assert parse_environment(["A=1=2", "B"], {"B": "x"}) == {"A": "1=2", "B": "x"}
    assert parse_environment(None, {}) == {}
    with pytest.raises(UserError, match="C is not set here"):
        parse_environment(["C"], {})


def test_deepspeed_gives_the_local_rank_as_an_argument() -> None:
    call = adapt(ScriptCall("t.py", ["--x"]), "deepspeed", 2, 4)
    assert call.command("python", "3") == ["python", "-u", "t.py", "--local_rank=3", "--x"]
    assert not adapt(ScriptCall("t.py"), "deepspeed --no_local_rank", 2, 4).local_rank_argument
    # The sizes are those of the ranks as they are placed, whatever was requested.
    placed = call.torchrun_environment({"RANK": "5", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"})
    assert [placed[name] for name in ("LOCAL_SIZE", "CROSS_SIZE", "CROSS_RANK")] == ["2", "3", "2"]


def test_a_script_for_another_launcher_is_noticed() -> None:
    assert notes("from accelerate import Accelerator\n", "torchrun")[0].startswith("note: the script uses accelerate")
    assert notes("import deepspeed\nparser.add_argument('--local_rank')\n", "torchrun")
    assert notes("from accelerate import Accelerator\n", "accelerate launch --cpu") == []
    assert notes("import torch  # accelerated", "torchrun") == []


ACCELERATE = """
import json, os, pathlib
from accelerate import Accelerator
accelerator = Accelerator()
state = accelerator.state
shown = [state.mixed_precision, accelerator.num_processes, accelerator.gradient_accumulation_steps,
         str(state.distributed_type)]
pathlib.Path(f"state_{os.environ['RANK']}.json").write_text(json.dumps(shown))
"""


@pytest.mark.slow
def test_accelerates_settings_reach_the_script(tmp_path: Path) -> None:
    (tmp_path / "state.py").write_text(ACCELERATE)
    config = tmp_path / "config.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: bf16\n"
        "num_machines: 1\nnum_processes: 2\nuse_cpu: false\ngpu_ids: all\n"
    )
    options = ["--config_file", config, "--main_process_port", 0]
    by_library = execute(tmp_path, BINARIES / "accelerate", "launch", *options, "state.py")
    assert by_library.returncode == 0, by_library.stderr
    expected = [json.loads((tmp_path / f"state_{rank}.json").read_text()) for rank in (0, 1)]
    assert expected[0][0] == "bf16"
    started = bigtrain_run(
        tmp_path, "--nproc", 2, "--launcher", f"accelerate launch --config_file {config}", "state.py"
    )
    assert started.returncode == 0, started.stderr
    assert [json.loads((tmp_path / f"state_{rank}.json").read_text()) for rank in (0, 1)] == expected


def test_every_launcher_is_found_by_its_name() -> None:
    assert {name: LAUNCHERS[name].name for name in LAUNCHERS} == {
        name: name for name in ("accelerate", "deepspeed", "torchrun")
    }


PUBLIC = ("test_ops", "test_distributed_data_loop", "test_sync", "test_script")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PUBLIC)
def test_accelerates_own_test_scripts_end_as_under_its_launcher(name: str, tmp_path: Path) -> None:
    import accelerate.test_utils

    script = Path(accelerate.test_utils.__file__).parent / "scripts" / f"{name}.py"
    by_library = execute(
        tmp_path,
        BINARIES / "accelerate",
        "launch",
        "--multi_gpu",
        "--num_processes",
        2,
        "--main_process_port",
        0,
        script,
    )
    started = bigtrain_run(tmp_path, "--nproc", 2, "--launcher", "accelerate --multi_gpu", "job.max_failures=0", script)
    assert started.returncode == by_library.returncode, (by_library.stderr[-2000:], started.stdout[-2000:])
    print(name, started.returncode)
