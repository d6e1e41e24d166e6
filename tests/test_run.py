"""What is trained and how, identity, the run directory, its lease."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bigtrain.run
from bigtrain.config import UserError, yaml_file
from bigtrain.models.config import FAMILIES, preset, presets
from bigtrain.run import (
    LEASE_LIFE_S,
    Lease,
    RunConfig,
    RunDirectory,
    config_schema,
    differences,
    find_run,
    identity,
    lease_check,
    list_runs,
    load_config,
    recipe_of,
    split_run_step,
)

ROOT = Path(__file__).resolve().parent.parent
BASE: dict[str, Any] = {
    "name": "base",
    "model": {"arch": "gpt2", "layers": 2, "width": 32, "heads": 4, "context": 16},
    "data": {"train": "shards/train", "validation": "shards/validation"},
    "batch": {"size": 4},
    "duration": "100 steps",
    "schedule": {"name": "cosine", "warmup": "5 steps"},
}
FINGERPRINTS: dict[str, str | None] = {"train": "sha256:aa", "validation": "sha256:bb"}

WHAT = {
    "seed": "seed=1",
    "model": "model.layers=3",
    "data": "data.document_mask=true",
    "batch": "batch.size=5",
    "duration": "duration=101 steps",
    "optimizer": "optimizer.lr=2e-3",
    "schedule": "schedule.final_lr=1e-5",
    "precision": "precision=fp32",
    "init": "init.hash=xxh3:00",
}
"""One change of each key that says what is trained."""
HOW = {
    "callbacks": "callbacks=[{name: early_stop}]",
    "name": "name=other",
    "streaming": "streaming.log_samples=true",
    "engine": "engine.deterministic=true",
    "layout": "layout.micro_size=2",
    "checkpoint": "checkpoint.every=7 steps",
    "evaluation": "evaluation.batches=3",
    "bad_steps": "bad_steps.limit=3",
    "tracking": "tracking.every=5 steps",
    "job": "job.max_failures=1",
}
"""One change of each key that says how it is run."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def what_of(config: RunConfig, fingerprints: dict[str, str | None] = FINGERPRINTS) -> dict[str, Any]:
    return recipe_of(config, fingerprints, config.batch.size.sequences(config.model.context))


def identity_of(file: Path, *overrides: str) -> str:
    return identity(what_of(load_config(file, list(overrides))))


def test_every_key_says_either_recipe_of_or_how() -> None:
    assert set(WHAT).isdisjoint(HOW)
    assert set(RunConfig.model_fields) == set(WHAT) | set(HOW), "put the new key into WHAT or HOW"


@pytest.mark.parametrize("override", WHAT.values(), ids=WHAT)
def test_another_what_is_another_identity(file: Path, override: str) -> None:
    assert identity_of(file, override) != identity_of(file)


@pytest.mark.parametrize("override", HOW.values(), ids=HOW)
def test_another_how_is_the_same_identity(file: Path, override: str) -> None:
    assert load_config(file, [override]) != load_config(file)
    assert identity_of(file, override) == identity_of(file)


def test_data_counts_by_its_content_and_not_by_its_place(file: Path) -> None:
    moved = load_config(file, ["data.train=/elsewhere/train", "data.validation=/elsewhere/validation"])
    assert identity(what_of(moved)) == identity_of(file)
    for key in FINGERPRINTS:
        assert identity(what_of(moved, {**FINGERPRINTS, key: "sha256:cc"})) != identity_of(file)


def test_an_initial_checkpoint_counts_by_its_content_and_not_by_its_place(file: Path) -> None:
    first = ("init.source=/runs/a@10", "init.hash=xxh3:00")
    assert identity_of(file, *first) == identity_of(file, "init.source=/moved/a@10", "init.hash=xxh3:00")
    assert identity_of(file, *first) != identity_of(file, "init.source=/runs/a@10", "init.hash=xxh3:11")
    assert identity_of(file, *first) != identity_of(file, *first, "init.state=all")
    assert identity_of(file, *first) != identity_of(file, *first, "init.fresh=[head.*]")


def test_a_batch_counts_by_its_sequences(file: Path) -> None:
    assert identity_of(file, "batch.size=64 tokens") == identity_of(file, "batch.size=4 sequences") == identity_of(file)


@pytest.mark.parametrize(
    ("schedule", "counts"), [("{name: constant}", False), ("{name: wsd}", False), ("{name: cosine}", True)]
)
def test_the_duration_counts_only_where_the_schedule_ends_at_it(file: Path, schedule: str, counts: bool) -> None:
    longer = identity_of(file, f"schedule={schedule}", "duration=200 steps")
    assert (longer != identity_of(file, f"schedule={schedule}")) is counts


def test_differences_name_each_key_with_both_values() -> None:
    old = {"optimizer": {"lr": 0.1, "clip": 1.0}, "seed": 1}
    new = {"optimizer": {"lr": 0.2, "clip": 1.0}, "precision": "bf16"}
    assert list(differences(old, new)) == [
        "optimizer.lr: 0.1 -> 0.2", "precision: (absent) -> bf16", "seed: 1 -> (absent)",
    ]  # fmt: skip
    assert not list(differences(old, old))


# Config in, config out


def reloaded(config: RunConfig, path: Path) -> RunConfig:
    path.write_text(yaml_file.dump(config.plain()))
    return load_config(path)


MODELS: list[dict[str, Any]] = [
    *({"preset": name} for name in presets()),
    {"preset": "gpt2-124m", "mlp": "relu", "tied": False},
    {"arch": "llama", "layers": 1, "width": 8, "heads": 2, "context": 4, "rope_scaling": {"factor": 2.0}},
    {"arch": "qwen3", "layers": 1, "width": 8, "heads": 2, "context": 4},
    {"arch": "vit", "image_size": 28},
    {"arch": "dcgan", "image_size": 28},
    {"arch": "lenet", "image_size": 28},
    {"arch": "resnet", "image_size": 28},
    {"arch": "vae", "variational": False},
    {"arch": "rnn", "cell": "gru", "context": 8},
    {"arch": "seq2seq", "context": 8},
    {"arch": "bert", "context": 8},
    {"arch": "bert_classifier", "context": 8, "vocabulary": 257},
    {"arch": "dalle", "image_size": 32, "context": 8},
    {"arch": "sam", "image_size": 32, "boxes": 0.2},
    {"arch": "clip", "image_size": 32, "context": 8},
    {"arch": "captioner", "image_size": 28, "context": 8},
    {"arch": "hf", "hf": "a-name-on-a-hub", "context": 16},
    {"arch": "dpo", "policy": {"preset": "gpt2-124m", "adapter": {"name": "lora"}}, "beta": 0.2},
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.get("preset", model.get("arch")))
def test_a_resolved_config_reloads_to_the_identical_one(model: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**BASE, "model": model}))
    config = load_config(path)
    again = reloaded(config, tmp_path / "resolved.yaml")
    assert again == config
    assert again.plain() == config.plain()
    assert "preset" not in config.plain()["model"]


def test_the_models_above_are_of_every_family() -> None:
    assert {model.get("arch") or preset(model["preset"])["arch"] for model in MODELS} == set(FAMILIES)


floats = st.floats(1e-12, 1e3)
durations = st.one_of(
    st.integers(1, 10**9).map(lambda value: f"{value} steps"),
    st.integers(1, 10**15).map(lambda value: f"{value} tokens"),
    st.floats(0.01, 1e4).map(lambda value: f"{value!r} epochs"),
)
optimizers = st.one_of(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["adamw", "adam"]), "lr": floats},
        optional={
            "betas": st.lists(st.floats(0, 0.999), min_size=2, max_size=2), "clip": st.none() | floats,
            "groups": st.lists(st.fixed_dictionaries({"pattern": st.text(max_size=5), "lr_scale": floats}), max_size=2),
        },
    ),
    st.fixed_dictionaries({"name": st.just("sgd"), "momentum": st.floats(0.1, 0.99), "nesterov": st.booleans()}),
    st.fixed_dictionaries({"name": st.just("rmsprop"), "alpha": st.floats(0, 0.99)}),
)  # fmt: skip
schedules = st.one_of(
    st.fixed_dictionaries({"name": st.just("constant"), "warmup": durations}),
    st.fixed_dictionaries({"name": st.just("cosine"), "final_lr": floats}),
    st.fixed_dictionaries({
        "name": st.just("wsd"), "decay": st.integers(0, 100).map("{}%".format) | durations,
        "shape": st.sampled_from(["linear", "1-sqrt", "cosine"]),
    }),
)  # fmt: skip
runs = st.fixed_dictionaries(
    {"duration": durations, "optimizer": optimizers, "schedule": schedules},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "batch": st.fixed_dictionaries(
            {"size": st.integers(1, 10**6) | st.sampled_from(["512k tokens", "2Mi tokens"])}
        ),
        "checkpoint": st.fixed_dictionaries(
            {"every": st.sampled_from(["15 min", "1e9 tokens", "3 steps"])},
            optional={"permanent": st.none() | st.sampled_from(["1e9 tokens", "9 steps"])},
        ),
        "bad_steps": st.fixed_dictionaries({"spike": st.none() | st.floats(0.1, 99), "then": st.just("stop")}),
        "layout": st.fixed_dictionaries({"micro_size": st.none() | st.integers(1, 99) | st.just("1k")}),
        "job": st.fixed_dictionaries(
            {"limits": st.fixed_dictionaries({"start": st.just("5 min") | st.floats(1, 1e6)})}
        ),
        "tracking": st.fixed_dictionaries({"tags": st.lists(st.text(max_size=5), max_size=3)}),
    },
)


def test_keys_that_were_added_later_are_part_of_the_identity_once_they_are_set(file: Path) -> None:
    """A run that began before there was such a key resumes."""
    config = load_config(file)
    later = type(config.model).later_keys
    assert later
    assert not later & what_of(config)["model"].keys()
    assert what_of(load_config(file, ["model.sliding_window=8"]))["model"]["sliding_window"] == 8


@given(sections=runs)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_reloads_to_the_identical_one_and_fits_the_schema(
    sections: dict[str, Any], tmp_path: Path, schema: jsonschema.Validator
) -> None:
    path = tmp_path / "run.yaml"
    written = {**BASE, **sections}
    path.write_text(yaml_file.dump(written))
    config = load_config(path)
    again = reloaded(config, tmp_path / "resolved.yaml")
    assert again == config
    assert identity(recipe_of(again, {}, 1)) == identity(recipe_of(config, {}, 1))
    for value in (written, config.plain()):
        schema.validate(value)


# JSON Schema


@pytest.fixture(scope="module")
def schema() -> jsonschema.Validator:
    value = config_schema()
    jsonschema.Draft202012Validator.check_schema(value)
    return jsonschema.Draft202012Validator(value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_accepts_the_configs_that_come_with_bigtrain(path: Path, schema: jsonschema.Validator) -> None:
    schema.validate(yaml_file.parse(path.read_text(), str(path)).value)


@pytest.mark.parametrize(
    "sections",
    [
        {"optimzer": {}},
        {"optimizer": {"name": "adamw", "lrr": 1}},
        {"optimizer": {"name": "adamww"}},
        {"model": {**BASE["model"], "heds": 4}},
        {"model": {"preset": "llama3-8b", "heds": 4}},
        {"model": {"preset": "llama3-8bb"}},
        {"model": {"arch": "lama"}},
        {"model": {"arch": "llama"}},
        {"job": {"limits": {"stap": 1}}},
        {"schedule": {"name": "wsd", "shap": "linear"}},
        {"precision": "fp99"},
        {"duration": 100},
        {"seed": "x"},
    ],
    ids=str,
)
def test_the_schema_refuses_what_the_loader_refuses(
    sections: dict[str, Any], schema: jsonschema.Validator, tmp_path: Path
) -> None:
    value = {**BASE, **sections}
    assert not schema.is_valid(value)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(UserError):
        load_config(tmp_path / "run.yaml")


def test_the_schema_describes_every_key(schema: jsonschema.Validator) -> None:
    assert all("description" in key or "$ref" in key for key in schema.schema["properties"].values())


# The run directory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "base")


def test_a_run_records_its_config_and_once_what_it_trains(directory: RunDirectory, file: Path) -> None:
    assert not directory.exists()
    with pytest.raises(UserError, match="There is no run"):
        directory.recipe()
    first = load_config(file)
    directory.write(first, what_of(first))
    assert load_config(directory.config) == first
    longer = load_config(file, ["job.max_failures=1"])
    directory.write(longer, what_of(longer))
    assert load_config(directory.config) == longer
    assert directory.recipe() == what_of(first)
    directory.check_identity(longer, what_of(longer))
    other = load_config(file, ["seed=2"])
    with pytest.raises(UserError, match=r"seed: 1337 -> 2") as caught:
        directory.check_identity(other, what_of(other))
    assert "--fork" in (caught.value.fix or "")


def test_a_record_of_a_newer_bigtrain_or_damaged_is_refused(directory: RunDirectory) -> None:
    directory.path.mkdir(parents=True)
    directory.record.write_text(json.dumps({"format_version": 99, "what": {}}))
    with pytest.raises(UserError, match="format version 99"):
        directory.recipe()
    for damaged in ("{", "[]", "{}", ""):
        directory.record.write_text(damaged)
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            directory.recipe()


def test_only_a_directory_with_a_strangers_files_is_foreign(directory: RunDirectory, file: Path) -> None:
    assert not directory.is_foreign()
    Lease.acquire(directory)
    directory.event("fault")
    (directory.path / ".lease.json.tmp-0a1b2c3d").touch()
    assert not directory.is_foreign(), "a start that was killed is no stranger"
    (directory.path / "thesis.tex").touch()
    assert directory.is_foreign()
    config = load_config(file)
    directory.write(config, what_of(config))
    assert not directory.is_foreign()


def test_runs_are_found_by_name_and_by_path(directory: RunDirectory, file: Path) -> None:
    config = load_config(file)
    directory.write(config, what_of(config))
    runs_dir = directory.path.parent
    assert find_run("base", runs_dir).path == directory.path
    assert find_run(str(directory.path), Path("elsewhere")).path == directory.path
    assert [run.name for run in list_runs(runs_dir)] == ["base"]
    assert list_runs(runs_dir / "absent") == []
    with pytest.raises(UserError) as caught:
        find_run("bace", runs_dir)
    assert caught.value.fix == "Did you mean 'base'?"


def test_a_step_is_parsed_only_after_a_runs_name() -> None:
    assert split_run_step("tiny@300") == ("tiny", 300)
    assert split_run_step("a@b/tiny") == ("a@b/tiny", None)
    assert split_run_step("tiny@") == ("tiny@", None)


# The lease

HOLD = """
import sys, time
from pathlib import Path
from bigtrain.run import Lease, RunDirectory
lease = Lease.acquire(RunDirectory(Path(sys.argv[1])))
print(lease.number, flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold(directory: RunDirectory) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that takes the lease and lives on."""
    processes = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory.path)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_lease_is_refused_while_its_holder_lives_and_taken_over_when_it_was_killed(
    directory: RunDirectory, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    process = hold()
    fenced = Lease(directory, 1)
    assert fenced.held()
    with pytest.raises(UserError, match=f"in use by process {process.pid}") as caught:
        Lease.acquire(directory)
    assert "bigtrain stop base" in (caught.value.fix or "")
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie does not hold it either
    lease = Lease.acquire(directory)
    assert lease.number == 2
    assert lease.held()
    assert not fenced.held()
    assert not lease_check(directory, 1)()
    assert lease.predecessor is not None
    assert lease.predecessor.pid == process.pid
    fenced.release()
    assert lease.held(), "the fenced holder's release changes nothing"


@pytest.mark.parametrize("content", ["", '{"number": 2, "ho', '{"number": "3"}', "[]", "null"])
def test_a_damaged_lease_file_does_not_lower_the_number(directory: RunDirectory, content: str) -> None:
    Lease.acquire(directory).release()
    directory.lease.write_text(content)
    assert Lease.acquire(directory, published=4).number == 5


def test_a_renewal_in_the_future_blocks_no_one(directory: RunDirectory) -> None:
    Lease.acquire(directory).release()
    elsewhere = {**json.loads(directory.lease.read_text()), "host": "elsewhere", "boot": "b", "pid": 1}
    directory.lease.write_text(json.dumps({**elsewhere, "renewed": time.time() + 10 * LEASE_LIFE_S}))
    assert Lease.acquire(directory).number == 2


def test_a_released_lease_keeps_its_number(directory: RunDirectory) -> None:
    first = Lease.acquire(directory)
    first.release()
    holder = Lease.holder(directory)
    assert holder is not None
    assert not holder.alive()
    second = Lease.acquire(directory)
    assert (first.number, second.number, second.predecessor) == (1, 2, None)
    assert not first.held()


def test_a_later_process_of_the_same_id_is_not_the_holder(directory: RunDirectory) -> None:
    Lease.acquire(directory)
    value = json.loads(directory.lease.read_text())
    directory.lease.write_text(json.dumps({**value, "started": value["started"] + 1}))
    assert Lease.acquire(directory).number == 2


def test_a_holder_on_another_machine_lives_by_its_renewals(directory: RunDirectory) -> None:
    Lease.acquire(directory)
    elsewhere = {**json.loads(directory.lease.read_text()), "host": "elsewhere", "boot": "b", "pid": 1}
    directory.lease.write_text(json.dumps({**elsewhere, "renewed": time.time()}))
    with pytest.raises(UserError, match="on elsewhere"):
        Lease.acquire(directory)
    directory.lease.write_text(json.dumps({**elsewhere, "renewed": time.time() - LEASE_LIFE_S - 1}))
    assert Lease.acquire(directory).number == 2


def test_every_public_name_of_the_package_is_there_and_light_ones_import_no_config() -> None:
    assert all(hasattr(bigtrain.run, name) for name in bigtrain.run.__all__)
    code = "import sys; from bigtrain.run import ExitCode; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
