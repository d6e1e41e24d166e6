"""The command as a person, or a program, meets it: real processes, bad input and what they print."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
import yaml

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.cli import app as cli_app
from bigtrain.data.encoding.learned import train_bpe
from bigtrain.data.formats.documents import documents
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
from bigtrain.run import ExitCode, Lease, RunDirectory, load_config
from bigtrain.storage import read_lines
from bigtrain.training.prepare import prepare
from tests.calls import calls_of
from tests.in_process import STARTS_NO_PROCESS, run_here

Command = Callable[..., subprocess.CompletedProcess[str]]

RUN_TIMEOUT_S = 120
STATUS_KEYS = {
    "name", "state", "step", "loss", "tokens_per_s", "units", "goodput", "nodes", "epochs", "restarts", "last_event",
    "eta_s", "forecast", "wandb_url", "time", "energy_j", "metrics", "best",
}  # fmt: skip
CONFIG = {
    "name": "tiny",
    "model": {"arch": "llama", "layers": 1, "width": 16, "heads": 2, "context": 32, "tied": True},
    "data": {"train": "shards/train", "validation": "shards/validation"},
    "batch": {"size": 4},
    "duration": "4 steps",
    "schedule": {"name": "wsd", "decay": "50%"},
    "precision": "fp32",
    "evaluation": {"every": "4 steps", "batches": 1},
    "checkpoint": {"every": "2 steps"},
    "tracking": {"wandb": "disabled"},
}


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    if arguments[0] in STARTS_NO_PROCESS:
        return run_here(*arguments, cwd=cwd)
    return subprocess.run(
        [sys.executable, "-m", "bigtrain.cli", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False,
    )  # fmt: skip


def trained(place: Path, *arguments: object) -> None:
    result = command("train", "tiny.yaml", *arguments, cwd=place)
    assert result.returncode == ExitCode.FINISHED, result.stderr


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a person has it: texts, shards of two tokenizers, a config, a run of 4 steps saved at 2 and 4."""
    place = tmp_path_factory.mktemp("origin")
    library = Path(os.__file__).parent
    (place / "text").mkdir()
    for name in ("abc", "bisect", "keyword", "queue", "stat", "this"):
        shutil.copy(library / f"{name}.py", place / "text")
    (place / "empty.txt").touch()
    (place / "binary.txt").write_bytes(b"text\0\x01\xff" * 10)
    (place / "tiny.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    train_bpe(documents([place / "text"]), 300, place / "bpe.json")
    for out, tokenizer in (("shards", "bytes"), ("other", place / "bpe.json")):
        pack([place / "text"], place / out, Tokenizer.open(str(tokenizer)), validation="20%")
    trained(place)
    return place


@pytest.fixture
def place(origin: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be spoilt."""
    return shutil.copytree(origin, tmp_path / "place")


def files_under(directory: Path) -> dict[str, int]:
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in directory.rglob("*")}


# Bad input


def repack(place: Path) -> None:
    shutil.rmtree(place / "shards")
    (place / "text" / "this.py").write_text("another text\n")
    pack([place / "text"], place / "shards", Tokenizer.open("bytes"), validation="20%")


def flip_a_byte(place: Path) -> None:
    shard = place / "shards" / "train" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def delete_a_shard(place: Path) -> None:
    (place / "shards" / "train" / "shard-000000.tar").unlink()


def exchange_shards(place: Path) -> None:
    resolved = place / "runs" / "tiny" / "config.yaml"
    value = yaml.safe_load(resolved.read_text())
    value["data"]["train"] = str(place / "other" / "train")
    resolved.write_text(yaml.safe_dump(value))


def lease_to_this_process(place: Path) -> None:
    directory = RunDirectory(place / "runs" / "tiny")
    shutil.rmtree(directory.checkpoints / "step_00000004")
    Lease.acquire(directory)


def occupy_the_name(place: Path) -> None:
    (place / "runs" / "thesis").mkdir()
    (place / "runs" / "thesis" / "chapter1.tex").touch()


TRAIN = ("train", "tiny.yaml")
NEW = (*TRAIN, "--name", "new")
PACK = ("--out", "packed", "--tokenizer", "bytes")
BAD_INPUT: dict[str, tuple[Callable[[Path], None] | None, tuple[object, ...], tuple[str, ...]]] = {
    "typo in a key": (None, (*NEW, "optimzer.lr=1"), ("'optimzer'", "Did you mean 'optimizer'", "command line")),
    "wrong type": (None, (*NEW, "model.layers=many"), ("model.layers", "'many'")),
    "unknown preset": (None, (*NEW, "model={preset: llama3-9b}"), ("'llama3-9b'", "Did you mean 'llama3-8b'")),
    "unknown arch": (None, (*NEW, "model.arch=lama"), ("'lama'", "Did you mean 'llama'")),
    "unknown precision": (None, (*NEW, "precision=fp99"), ("precision", "'fp99'", "'bf16'")),
    "no such config": (None, ("train", "absent.yaml"), ("There is no file", "absent.yaml")),
    "sequence longer than positions": (None, (*NEW, "model.max_positions=8"), ("sequence longer than positions", "32")),
    "no training data": (None, (*NEW, "data.train=shards/nowhere"), ("no data", "shards/nowhere", "data pack")),
    "batch tokens not divisible": (None, (*NEW, "batch.size=100 tokens"), ("batch.size", "96 tokens would be")),
    "duration shorter than a step": (None, (*NEW, "duration=0 steps"), ("duration", "less than one step")),
    "duration by the clock": (None, (*NEW, "duration=5 min"), ("duration", "is a time")),
    "warm-up longer than the run": (
        None, (*NEW, "schedule={name: cosine, warmup: 9 steps}"), ("warmup takes 9 steps", "the run has 4"),
    ),
    "no process": (None, (*NEW, "--nproc", 0), ("--nproc is 0",)),
    "replicas that do not divide the ranks": (
        None, (*NEW, "--nproc", 3, "layout.dp_replicate=2"), ("dp_replicate 2", "3 ranks", "may be 1, 3"),
    ),
    "another tokenizer for validation": (
        None, (*NEW, "data.validation=other/validation"), ("tokenizers", "differ", "shards/train", "other/validation"),
    ),
    "another what under a name": (
        None, (*TRAIN, "seed=2", "optimizer.lr=1e-4"),
        ("trains something else", "seed: 1337 -> 2", "optimizer.lr: 0.001 -> 0.0001", "--fork"),
    ),
    "data packed again under a checkpoint": (repack, TRAIN, ("trains something else", "data.train: sha256:")),
    "a byte flipped under a checkpoint": (flip_a_byte, TRAIN, ("shard-000000.tar", "has changed")),
    "a shard deleted under a checkpoint": (delete_a_shard, TRAIN, ("shard-000000.tar is missing", "shards/train")),
    "run directory in use": (
        lease_to_this_process, TRAIN, ("in use by process", str(os.getpid()), "bigtrain stop tiny"),
    ),
    "directory that is no run": (occupy_the_name, (*TRAIN, "--name", "thesis"), ("thesis", "is not a run")),
    "sample with exchanged shards": (exchange_shards, ("sample", "tiny"), ("not those", "other/train")),
    "report of no run": (None, ("report", "tinny"), ("no run 'tinny'", "Did you mean 'tiny'")),
    "stop of a run that is over": (None, ("stop", "tiny"), ("'tiny' is not running",)),
    "fork onto a run": (None, (*TRAIN, "--fork", "tiny"), ("'tiny' exists already",)),
    "empty input": (None, ("data", "pack", "empty.txt", *PACK), ("the input is empty", "empty.txt")),
    "binary input": (None, ("data", "pack", "binary.txt", *PACK), ("binary", "binary.txt, byte 4")),
    "no such tokenizer": (
        None, ("data", "pack", "text", "--out", "packed", "--tokenizer", "absent.json"), ("absent.json",),
    ),
    "shard size that is none": (
        None, ("data", "pack", "text", *PACK, "--shard-size", "big"), ("--shard-size", "'big'"),
    ),
    "output that exists": (
        None, ("data", "pack", "text", "--out", "shards", "--tokenizer", "bytes"), ("'shards' exists",),
    ),
    "place that cannot be written": (None, (*NEW, "--runs-dir", "tiny.yaml/runs"), ("Not a directory", "tiny.yaml")),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "arguments", "says"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_clearly_before_anything_is_spent(
    spoil: Callable[[Path], None] | None, arguments: tuple[object, ...], says: tuple[str, ...], place: Path
) -> None:
    if spoil is not None:
        spoil(place)
    before = files_under(place)
    result = run_here(*arguments, cwd=place)
    assert result.returncode == ExitCode.USER, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not [part for part in says if part not in result.stderr], result.stderr
    assert files_under(place).keys() == before.keys()
    assert {name: at for name, at in files_under(place / "runs").items() if f"runs/{name}" in before} == {
        name.removeprefix("runs/"): at for name, at in before.items() if name.startswith("runs/")
    }


# For programs


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("status", "tinny"), "no run 'tinny'"),
        (("checkpoint", "verify", "tiny@3"), "no checkpoint of step 3"),
        (("config", "validate", "tiny.yaml", "seed=x"), "seed"),
        (("data", "inspect", "text"), "index.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_error_for_a_program_is_one_object(origin: Path, arguments: tuple[str, ...], says: str) -> None:
    result = run_here(*arguments, "--json", cwd=origin)
    error = json.loads(result.stdout)
    assert result.returncode == ExitCode.USER
    assert error.keys() == {"error", "where", "fix"}
    assert says in error["error"]
    assert "Traceback" not in result.stderr


def as_json(*arguments: object, cwd: Path) -> dict:
    result = command(*arguments, "--json", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_status_has_the_keys_that_programs_rely_on(origin: Path, tmp_path: Path) -> None:
    row = as_json("status", "tiny", cwd=origin)
    assert row.keys() == STATUS_KEYS
    assert (row["name"], row["state"], row["step"], row["last_event"]) == ("tiny", "finished", 4, "finished")
    assert [row.keys() for row in as_json("status", cwd=origin)["runs"]] == [STATUS_KEYS]
    assert as_json("status", cwd=tmp_path) == {"runs": []}


def test_checkpoints_are_listed_with_step_state_and_size(place: Path) -> None:
    rows = as_json("checkpoint", "list", "tiny", cwd=place)["checkpoints"]
    assert [(row["step"], row["verified"]) for row in rows] == [(2, True), (4, True)]
    assert all(row.keys() == {"step", "verified", "bytes", "best"} and row["bytes"] > 0 for row in rows)
    assert as_json("checkpoint", "verify", "tiny@4", cwd=place) == {"verified": [4]}
    shard = max((place / "runs/tiny/checkpoints/step_00000004").iterdir(), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [row["verified"] for row in as_json("checkpoint", "list", "tiny", cwd=place)["checkpoints"]] == [True, False]
    damaged = command("checkpoint", "verify", "tiny", "--json", cwd=place)
    assert damaged.returncode == ExitCode.FAILED
    assert json.loads(damaged.stdout).keys() == {"error", "where", "fix"}


def test_a_checkpoint_is_inspected_and_old_ones_are_pruned_but_for_the_last_good(place: Path) -> None:
    found = as_json("checkpoint", "inspect", "tiny@2", cwd=place)
    assert (found["step"], found["world_size"], found["permanent"], found["problems"]) == (2, 1, False, [])
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors["model.embedding.weight"] == {
        "name": "model.embedding.weight", "shape": [257, 16], "dtype": "float32", "pieces": 1,
    }  # fmt: skip
    assert "optimizer.embedding.weight.exp_avg" in tensors
    assert found["bytes"] == sum(file["bytes"] for file in found["files"].values())
    assert all(file["hash"].startswith("xxh3:") for file in found["files"].values())
    assert "optimizer.norm.weight.step" in command("checkpoint", "inspect", "tiny", cwd=place).stdout

    tried = as_json("checkpoint", "prune", "tiny", "--keep-last", 1, "--dry-run", cwd=place)
    assert tried == {"steps": [2], "dry_run": True}
    checkpoints = place / "runs/tiny/checkpoints"
    shard = max((checkpoints / "step_00000004").iterdir(), key=lambda file: file.stat().st_size)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert as_json("checkpoint", "prune", "tiny", "--keep-last", 1, cwd=place)["steps"] == []
    shard.write_bytes(whole)
    assert as_json("checkpoint", "prune", "tiny", "--keep-last", 1, cwd=place)["steps"] == [2]
    assert (checkpoints / "step_00000004").is_dir()
    lease = Lease.acquire(RunDirectory(place / "runs/tiny"))
    try:
        busy = command("checkpoint", "prune", "tiny", cwd=place)
        assert busy.returncode == ExitCode.USER
        assert "in use" in busy.stderr
    finally:
        lease.release()


def test_the_shown_config_is_the_same_config(origin: Path, tmp_path: Path) -> None:
    result = command("config", "show", "tiny.yaml", "optimizer.lr=3e-4", cwd=origin)
    (tmp_path / "shown.yaml").write_text(result.stdout)
    shown = load_config(tmp_path / "shown.yaml")
    assert shown.optimizer.lr == 3e-4
    assert shown.data.train == str(origin / "shards" / "train")
    assert as_json("config", "show", "tiny.yaml", "optimizer.lr=3e-4", cwd=origin) == shown.plain()
    again = command("config", "show", tmp_path / "shown.yaml", cwd=tmp_path)
    assert again.stdout == result.stdout
    valid = as_json("config", "validate", tmp_path / "shown.yaml", cwd=tmp_path)
    assert valid["total_steps"] == 4


def test_the_schema_is_json(origin: Path) -> None:
    schema = json.loads(command("config", "schema", cwd=origin).stdout)
    assert set(CONFIG) <= set(schema["properties"])


def test_data_commands_answer_with_one_object(place: Path) -> None:
    learned = as_json("data", "tokenizer", "text", "--vocab", 280, "--out", "small.json", cwd=place)
    assert learned == {"out": "small.json", "vocab_size": 280}
    packed = as_json(
        "data", "pack", "text", "--out", "p", "--tokenizer", "small.json", "--validation", "20%", cwd=place
    )
    assert packed["vocab_size"] == 280
    assert packed["splits"].keys() == {"train", "validation"}
    fingerprint = packed["splits"]["train"]["fingerprint"]
    inspected = as_json("data", "inspect", "p/train", cwd=place)
    assert (inspected["fingerprint"], inspected["vocab_size"]) == (fingerprint, 280)
    assert as_json("data", "verify", "p", cwd=place)["problems"] == []
    indexed = as_json("data", "index", "shards/train", cwd=place)
    assert indexed["kind"] == "tokens"
    flip_a_byte(place)
    damaged = command("data", "verify", "shards/train", "--json", cwd=place)
    assert damaged.returncode == ExitCode.FAILED
    assert "shard-000000.tar" in json.loads(damaged.stdout)["error"]


def imported(*arguments: str) -> set[str]:
    """The top-level packages that a fresh Python has imported in the end, without the standard library's."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    return names - sys.stdlib_module_names


HELP = ("-m", "bigtrain.cli", "--help")
TYPER = ("-c", "import typer")


def test_a_dry_run_checks_and_writes_nothing(origin: Path, tmp_path: Path) -> None:
    config = origin / "runs" / "tiny" / "config.yaml"
    command = ("train", config, "--name", "other", "--runs-dir", tmp_path, "--dry-run")
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "other: " in done.stderr
    assert " parameters, " in done.stderr
    assert list(tmp_path.iterdir()) == []
    wrong = run_here(*command, "layout.tp=3", cwd=tmp_path)
    assert wrong.returncode == 2


def test_help_imports_typer_and_nothing_else() -> None:
    assert imported(*HELP) - imported(*TYPER) == {"bigtrain"}
    assert imported("-c", "import bigtrain") - imported("-c", "pass") == {"bigtrain"}


def parameters_of(app: typer.Typer) -> list[int]:
    """Of each command, those of groups included: how many arguments and options it has."""
    groups = [group.typer_instance for group in app.registered_groups if group.typer_instance]
    own = [
        len(inspect.signature(command.callback).parameters) for command in app.registered_commands if command.callback
    ]
    return own + [count for group in groups for count in parameters_of(group)]


COUNTS = parameters_of(cli_app)
OPTIONS = ", ".join(
    f'o{number}: Annotated[str | None, typer.Option(help="A text.")] = None'
    for number in range(round(sum(COUNTS) / len(COUNTS)))
)
BARE = f'''
from __future__ import annotations
from typing import Annotated
import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)
for number in range({len(COUNTS)}):
    def command({OPTIONS}) -> None:
        """Do it."""
    app.command(str(number))(command)
app(["--help"])
'''


def test_help_does_no_more_than_that_of_a_plain_typer_app(tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text(BARE)
    assert calls_of(*HELP) < calls_of(script)  # .84 times as many; 3.0 with the config, 1.35 with numpy


# Runs that go on


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in read_lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("name", ["../escaped", "a b/c", ".hidden", ""])
def test_a_fork_takes_the_name_of_a_run_and_no_path(place: Path, name: str) -> None:
    before = files_under(place)
    result = run_here("train", "tiny.yaml", "--fork", name, cwd=place)
    assert result.returncode == ExitCode.USER
    assert "cannot be the name of a run" in result.stderr
    assert files_under(place) == before


def test_a_directory_that_is_no_checkpoint_is_no_progress(place: Path) -> None:
    (place / "runs" / "tiny" / "checkpoints" / "step_99999999").mkdir()
    result = run_here("train", "tiny.yaml", cwd=place)
    assert result.returncode == ExitCode.FINISHED
    assert "is finished: 4 steps" in result.stderr


@pytest.mark.parametrize("missing", [True, False], ids=["missing", "truncated"])
def test_a_damaged_newest_checkpoint_is_reported_where_an_older_one_is_used(place: Path, missing: bool) -> None:
    (file,) = (place / "runs" / "tiny" / "checkpoints" / "step_00000004").glob("*.distcp")
    data = file.read_bytes()
    file.unlink()
    if not missing:
        file.write_bytes(data[:-1])
    damaged = "checkpoint of step 4 is damaged and is skipped"
    tried = run_here("train", "tiny.yaml", "--dry-run", cwd=place)
    assert (tried.returncode, "resuming after step 2" in tried.stderr) == (0, True)
    assert f"warning: {damaged}: {file.name}" in tried.stderr


@pytest.mark.slow
def test_a_fork_goes_on_from_the_newest_checkpoint_to_the_bit(place: Path, origin: Path) -> None:
    runs = place / "runs"
    shutil.rmtree(runs / "tiny" / "checkpoints" / "step_00000004")
    before = files_under(runs / "tiny")
    trained(place, "--fork", "branch")
    assert files_under(runs / "tiny") == before
    assert steps_of(runs / "branch") == [3, 4]
    forked = read_tensors(runs / "branch" / "checkpoints", 4, prefix="")
    undisturbed = read_tensors(origin / "runs" / "tiny" / "checkpoints", 4, prefix="")
    assert forked.keys() == undisturbed.keys()
    assert any(name.startswith("optimizer.") for name in forked)
    assert not [name for name in forked if not torch.equal(forked[name], undisturbed[name])]

    # A run holds to the checkpoint that it began with, whether that is still there or not.
    init = load_config(runs / "branch" / "config.yaml").init
    assert init.source == f"{runs / 'tiny'}@2"
    shutil.rmtree(runs / "tiny")
    for source in ("tiny", "runs/tiny@2"):
        trained(place, "--name", "branch", f"init={{source: {source}, state: all}}")
    moved = command(*TRAIN, "--name", "branch", "init={source: tiny@3, state: all}", cwd=place)
    assert moved.returncode == ExitCode.USER
    assert "tiny" in moved.stderr


def test_a_longer_duration_is_refused_under_wsd_once_it_decays(place: Path) -> None:
    result = run_here(*TRAIN, "duration=8 steps", cwd=place)
    assert result.returncode == ExitCode.USER
    assert "learning rate of step 3" in result.stderr
    assert "--fork" in result.stderr


@pytest.mark.slow
def test_a_longer_duration_is_allowed_under_wsd_before_its_decay(place: Path) -> None:
    shutil.rmtree(place / "runs" / "tiny" / "checkpoints" / "step_00000004")
    trained(place, "duration=6 steps")
    rates = [row["lr"] for row in read_lines(place / "runs" / "tiny" / "metrics.jsonl")]
    assert len(rates) == 6
    assert rates[:4] == [1e-3] * 4
    assert rates[4] > rates[5]


def test_a_longer_duration_is_refused_under_cosine_with_the_difference(place: Path) -> None:
    cosine = load_config(place / "tiny.yaml", ["schedule={name: cosine}"], name="cosine")
    data = {key: str(place / "shards" / key) for key in ("train", "validation")}
    cosine = cosine.model_copy(update={"data": cosine.data.model_copy(update=data)})
    RunDirectory(place / "runs" / "cosine").write(cosine, prepare(cosine).what)
    longer = (*TRAIN, "schedule={name: cosine}", "--name", "cosine", "duration=6 steps")
    before = files_under(place)
    result = run_here(*longer, cwd=place)
    assert result.returncode == ExitCode.USER
    assert "duration: 4 steps -> 6 steps" in result.stderr
    assert files_under(place) == before


@pytest.mark.slow
def test_a_longer_duration_continues_under_a_constant_schedule(place: Path) -> None:
    constant = (*TRAIN, "schedule={name: constant}", "--name", "constant")
    for duration in ("2 steps", "4 steps"):
        result = command(*constant, f"duration={duration}", cwd=place)
        assert result.returncode == ExitCode.FINISHED, result.stderr
    assert steps_of(place / "runs" / "constant") == [1, 2, 3, 4]
