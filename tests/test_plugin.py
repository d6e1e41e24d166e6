"""The user's own code: loaded where it is named and nowhere else, and part of what a run is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from bigtrain.checkpoint.loader import read_tensors
from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.models.check import check_model
from bigtrain.models.config import FAMILIES
from bigtrain.run import ExitCode, load_config
from bigtrain.storage import read_lines

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "configs" / "plugin" / "my_model.py"
README = ROOT / "bigtrain" / "models" / "README.md"
LINES = 30
MODEL = {"arch": "my-model", "width": 16, "context": 32}
DEADLINE_S = 120.0


@pytest.fixture
def plugin(tmp_path: Path) -> Callable[..., Path]:
    """Writes the example, changed by a replacement of one piece of its text, to a file of its own."""
    written = []

    def write(old: str = "", new: str = "") -> Path:
        text = EXAMPLE.read_text()
        assert old in text
        path = tmp_path / f"plugin_{len(written)}.py"
        path.write_text(text.replace(old, new) if old else text)
        written.append(path)
        return path

    return write


def test_the_readme_shows_the_example_as_it_runs() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), re.DOTALL)
    assert ("python", EXAMPLE.read_text()) in blocks
    assert ("yaml", (EXAMPLE.parent / "my_run.yaml").read_text()) in blocks


def test_the_page_of_networks_shows_one_that_passes_its_check() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (README.parent / "plain" / "README.md").read_text(), re.DOTALL)
    package = EXAMPLE.parent / "digits"
    for file in ("network.py", "__init__.py"):
        assert ("python", (package / file).read_text()) in blocks
    load_plugin(str(package))
    FAMILIES["digits-net"](width=4).check(10)


def test_the_example_is_as_short_as_documented() -> None:
    code = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(code) <= LINES


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl")]


@pytest.mark.slow
def test_one_and_two_processes_train_it_to_the_same_losses(
    bigtrain: Callable, write_config: Callable, tmp_path: Path
) -> None:
    config = write_config(model=MODEL)
    for nproc in (1, 2):
        result = bigtrain("train", config, "--plugin", EXAMPLE, "--nproc", nproc, "--name", f"on{nproc}")
        assert result.returncode == ExitCode.FINISHED, result.stderr
    one, two = (losses(tmp_path / "runs" / f"on{nproc}") for nproc in (1, 2))
    assert len(one) == 8
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_killed_and_resumed_it_is_the_undisturbed_run_to_the_bit(
    bigtrain: Callable, write_config: Callable, tmp_path: Path, nproc: int
) -> None:
    config = write_config(model=MODEL, duration="60 steps", precision="bf16", checkpoint={"every": "7 steps"})
    arguments = ["train", config, "--plugin", EXAMPLE, "--nproc", nproc]
    assert bigtrain(*arguments, "--name", "undisturbed").returncode == ExitCode.FINISHED
    killed = tmp_path / "runs" / "killed"
    command = [sys.executable, "-m", "bigtrain.cli", *map(str, arguments), "--name", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + DEADLINE_S
    while not (killed / "checkpoints" / "LATEST").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(losses(killed)) < 60
    result = bigtrain("train", killed / "config.yaml", "--plugin", EXAMPLE)
    assert result.returncode == ExitCode.FINISHED, result.stderr
    assert losses(killed) == losses(tmp_path / "runs" / "undisturbed")
    state, expected = (
        read_tensors(tmp_path / "runs" / run / "checkpoints", 60, prefix="") for run in ("killed", "undisturbed")
    )
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.slow
def test_a_run_keeps_to_the_code_that_it_was_started_with(
    bigtrain: Callable, write_config: Callable, plugin: Callable[..., Path], tmp_path: Path
) -> None:
    config, code = write_config(model=MODEL, duration="4 steps"), plugin()
    assert bigtrain("train", config, "--plugin", code).returncode == ExitCode.FINISHED
    run = tmp_path / "runs" / "tiny"
    record = json.loads((run / "run.json").read_text())
    assert record["plugin"]["place"] == str(code)
    assert record["plugin"]["sha256"] == record["what"]["model"]["plugin"] == load_plugin(str(code)).sources[0].sha256
    without = bigtrain("train", run / "config.yaml")
    assert without.returncode == ExitCode.USER
    assert f"Add --plugin {code}" in without.stderr
    moved = code.rename(tmp_path / "elsewhere.py")
    assert "Nothing to do" in bigtrain("train", run / "config.yaml", "--plugin", moved).stderr
    sampled = bigtrain("sample", "tiny", "--plugin", moved)
    assert sampled.returncode == ExitCode.USER
    assert "has no logits(batch)" in sampled.stderr
    assert bigtrain("report", "tiny").returncode == ExitCode.FINISHED
    assert bigtrain("checkpoint", "verify", "tiny").returncode == ExitCode.FINISHED
    moved.write_text(moved.read_text() + "\n")
    changed = bigtrain("train", run / "config.yaml", "--plugin", moved, "duration=8 steps")
    assert changed.returncode == ExitCode.USER
    assert f"model.plugin: {record['plugin']['sha256']} -> " in changed.stderr


@pytest.mark.slow
def test_a_rank_refuses_code_that_has_changed_under_the_run(
    write_config: Callable, plugin: Callable[..., Path], tmp_path: Path
) -> None:
    """As after a restart in place: the launcher has checked the file, and it was edited since."""
    from bigtrain.run import RunDirectory
    from bigtrain.training.prepare import prepare

    code = plugin()
    load_plugin(str(code))
    config = load_config(write_config(model=MODEL))
    directory = RunDirectory(tmp_path / "runs" / "tiny")
    directory.write(config, prepare(config).what)
    code.write_text(code.read_text() + "\n")
    environment = os.environ | {"BIGTRAIN_RUN": str(directory.path), "BIGTRAIN_PLUGIN": str(code)}
    result = subprocess.run(
        [sys.executable, "-m", "bigtrain.training.rank"], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == ExitCode.USER
    assert "The plugin of 'model' is not the one that this run was started with" in result.stderr


def test_no_config_can_name_code(bigtrain: Callable, write_config: Callable, plugin: Callable[..., Path]) -> None:
    code = plugin()
    with pytest.raises(UserError, match="Unknown model family 'my-model'") as unknown:
        load_config(write_config(model=MODEL))
    assert "--plugin FILE" in str(unknown.value)
    load_plugin(str(code))
    for sections in ({"model": {**MODEL, "plugin": str(code)}}, {"model": MODEL, "plugin": str(code)}):
        with pytest.raises(UserError, match=r"Unknown key '(model\.)?plugin'"):
            load_config(write_config(**sections))


def test_keys_of_a_plugin_are_typed(write_config: Callable) -> None:
    load_plugin(str(EXAMPLE))
    with pytest.raises(UserError, match=r"Unknown key 'model\.widht'") as caught:
        load_config(write_config(model={**MODEL, "widht": 3}))
    assert "Did you mean 'width'?" in str(caught.value)


def test_a_package_is_a_plugin_by_all_of_its_files(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "model.py").write_text(EXAMPLE.read_text())
    (package / "__init__.py").write_text("from .model import Config\n")
    loaded = load_plugin(str(package))
    assert [one.name for one in loaded.registered] == ["my-model"]
    other = tmp_path / "other"
    package.rename(other)
    (other / "model.py").write_text(EXAMPLE.read_text() + "\n")
    assert load_plugin(str(other)).sources != loaded.sources


def test_an_installed_module_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_of_a_user.py").write_text(EXAMPLE.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    assert [one.name for one in load_plugin("module_of_a_user").registered] == ["my-model"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("from torch import nn\n", "from torch import nm\n", "cannot be loaded: ImportError"),
        ("from torch import nn\n", "import a_sibling\n", "cannot be loaded: ModuleNotFoundError"),
        ("(PlainConfig)", "", "registers nothing"),
        ('Literal["my-model"] = "my-model"', 'Literal["llama"] = "llama"', "one of bigtrain's own"),
    ],
)
def test_code_that_is_no_plugin_is_reported(plugin: Callable[..., Path], old: str, new: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_plugin(str(plugin(old, new)))


def test_a_plain_network_gives_its_name_to_a_plugin_s(plugin: Callable[..., Path]) -> None:
    place = str(plugin('Literal["my-model"] = "my-model"', 'Literal["dcgan"] = "dcgan"'))
    (registered,) = load_plugin(place).registered
    from bigtrain.models.families.dcgan import Config  # imported later, it changes nothing

    assert registered.name == "dcgan"
    assert FAMILIES["dcgan"] is registered.value
    del FAMILIES.found["dcgan"]
    assert FAMILIES["dcgan"] is Config
    assert Config.plugin is None


@pytest.mark.parametrize("place", ["nowhere.py", "no_such_module", "./nowhere"])
def test_a_missing_plugin_is_reported(place: str) -> None:
    with pytest.raises(UserError, match="There is no"):
        load_plugin(place)


HEAD = "        self.head ="
EMBED = "        x = self.embedding"
SUMS = "LossSum((losses * weights).sum(), weights.sum())"
BROKEN = {
    "a renormalised table": (HEAD, f"        self.embedding.max_norm = 1.0\n{HEAD}", "max_norm"),
    "a mean": (SUMS, "losses.mean()", "a sum of losses and"),
    "a loss in BF16": ("(losses * weights).sum()", "(losses * weights).sum().bfloat16()", "loss in bfloat16"),
    "a mistake": ("self.embedding(tokens)", "self.embeding(tokens)", "no attribute 'embeding'"),
    "a mean over the batch": (
        "self.positions.weight",
        "self.embedding(tokens).mean(0)",
        "sum of the losses of its parts",
    ),
    "weights changed in forward": (
        EMBED,
        f"        with torch.no_grad():\n            self.head.weight.mul_(0.99)\n{EMBED}",
        "changes the parameter 'head.weight'",
    ),
    "weights changed by data": (
        EMBED,
        f"        self.head.weight.data = self.head.weight.data * 0.99\n{EMBED}",
        "head.weight",
    ),
    "a counter": (EMBED, f"        self.calls = getattr(self, 'calls', 0) + 1\n{EMBED}", "changes 'calls'"),
    "hidden state": (
        "        losses =",
        "        x = x + getattr(self, 'last', 0)\n        self.last = x.detach()\n        losses =",
        "changes 'last'",
    ),
    "noise of NumPy": (
        EMBED,
        f"        weights = weights * torch.from_numpy(np.random.rand(*weights.shape))\n{EMBED}",
        "loss",
    ),
    "a clock": (EMBED, f"        weights = weights + time.time() % 1e-2\n{EMBED}", "reads a clock"),
    "a generator of its own": (
        EMBED,
        f"        weights = weights + torch.rand(1, generator=torch.Generator().manual_seed(1))\n{EMBED}",
        "from its own generator",
    ),
    "a codebook": (
        HEAD,
        f"        self.register_buffer('seen', torch.zeros(()))\n{HEAD}",
        "changes the buffer 'seen'",
    ),
    "values that nothing seeds": (
        HEAD,
        f"        self.positions.weight.data.mul_(time.time() % 1)\n{HEAD}",
        "different values in two calls",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_module_whose_losses_would_depend_on_the_layout_is_refused(plugin: Callable[..., Path], what: str) -> None:
    old, new, said = BROKEN[what]
    path = plugin(old, new)
    text = path.read_text()
    if what == "a codebook":
        text = text.replace(EMBED, f"        self.seen += tokens.float().sum()\n{EMBED}")
    path.write_text("import time\nimport numpy as np\nimport torch\n" + text)
    load_plugin(str(path))
    config = FAMILIES["my-model"](width=16, context=8)
    with pytest.raises(UserError, match=said) as caught:
        check_model(config, 19)
    assert path.name in (caught.value.where or "")


LEGAL = {
    "dropout": ('"dropout": 0.0', '"dropout": 0.1'),
    "a buffer": (HEAD, f"        self.register_buffer('scale', torch.ones(1))\n{HEAD}"),
    "a parameter of its own values": (HEAD, f"        self.scale = nn.Parameter(torch.ones(()))\n{HEAD}"),
    "a look at values": (EMBED, f"        assert tokens.sum().item() >= 0\n{EMBED}"),
    "a block called twice": ("x = layer(x", "x = layer(x, mask, is_causal=True)\n            x = layer(x"),
    "a second loss": (
        "            x = layer(x",
        "            layer.second = x.square().mean()\n            x = layer(x",
    ),
    "a cache": (EMBED, f"        self.cache = getattr(self, 'cache', torch.ones(1))\n{EMBED}"),
    "losses without weights": (SUMS, "LossSum(losses.sum(), torch.tensor(float(losses.numel())))"),
}


@pytest.mark.parametrize("what", LEGAL)
def test_what_is_the_same_at_every_layout_is_legal(plugin: Callable[..., Path], what: str) -> None:
    path = plugin(*LEGAL[what])
    path.write_text("import torch\n" + path.read_text())
    load_plugin(str(path))
    check_model(FAMILIES["my-model"](width=16, context=8), 19)


def test_the_schema_for_editors_knows_a_plugin(bigtrain: Callable) -> None:
    from bigtrain.run import config_schema

    load_plugin(str(EXAMPLE))
    schema = config_schema()
    assert schema["$defs"]["model.my-model"]["properties"]["width"]["default"] == 64


def test_the_config_beside_the_example_fits_it(tmp_path: Path) -> None:
    text = (EXAMPLE.parent / "my_run.yaml").read_text()
    load_plugin(str(EXAMPLE))
    config = load_config(EXAMPLE.parent / "my_run.yaml")
    assert config.model.arch == yaml.safe_load(text)["model"]["arch"]
