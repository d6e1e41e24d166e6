"""What cannot be run is refused by `bigtrain train` before a process is started, naming the sizes that would work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.config.plugin import load_plugin
from bigtrain.jobs.train import train
from bigtrain.run import load_config

PLUGIN = Path(__file__).parents[2] / "configs" / "plugin" / "my_model.py"
PLAIN = "model={arch: my-model, width: 16, context: 32}"
IMPOSSIBLE: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "heads that tp does not divide": (3, ("layout.tp=3",), ("model.heads 4", "model.kv_heads 2", "tp may be 1, 2")),
    "more ranks for tp than heads": (8, ("layout.tp=8",), ("tp may be 1, 2",)),
    "a context that tp does not divide": (
        2, ("layout.tp=2", "model.context=31"), ("model.context 31", "tp may be 1", "sequence_parallel: false"),
    ),
    "ranks that tp does not divide": (3, ("layout.tp=2",), ("3 ranks", "tp may be 1, 3")),
    "replicas that do not divide the ranks": (
        4, ("layout.dp_replicate=3",), ("4 ranks", "dp_replicate may be 1, 2, 4"),
    ),
    "more shards than ranks": (2, ("layout.dp_shard=4",), ("dp_shard 4", "2 ranks")),
    "replicas under deepspeed": (
        2, ("engine.name=deepspeed", "layout.dp_replicate=2"), ("layout.dp_replicate is 2", "dp_replicate to 1"),
    ),
    "offload without anything spread": (
        2, ("engine={name: deepspeed, zero: 0, offload: optimizer}",), ("zero 1, 2 or 3",),
    ),
    "compilation under deepspeed": (2, ("engine={name: deepspeed, compile: true}",), ("use name: fsdp",)),
    "a ZeRO stage that is none": (2, ("engine={name: deepspeed, zero: 4}",), ("0, 1, 2 or 3",)),
    "a native model under accelerate": (2, ("engine.name=accelerate",), ("{name: deepspeed} or {name: fsdp}",)),
    "a plain module under deepspeed": (2, (PLAIN, "engine.name=deepspeed"), ("{name: fsdp}", "full contract")),
    "a plain module under tp": (2, (PLAIN, "layout.tp=2"), ("no tensor plan", "use tp 1")),
    "document masks for a plain module": (1, (PLAIN, "data.document_mask=true"), ("does not support it", "llama")),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_the_impossible_is_refused_before_a_process_is_started(
    write_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    nproc, overrides, said = IMPOSSIBLE[case]

    def started(*_: object, **__: object) -> int:
        pytest.fail("a process would have been started")

    monkeypatch.setattr("bigtrain.jobs.train.launch_here", started)
    path, runs = write_config(), tmp_path / "runs"
    load_plugin(str(PLUGIN))
    with pytest.raises(UserError) as caught:
        train(load_config(path, list(overrides)), runs, procs=nproc)
    assert caught.value.exit_code == 2
    for piece in said:
        assert piece in str(caught.value)
    assert not runs.exists()
