from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bigtrain.checkpoint.export import export
from bigtrain.config import CorruptionError, UserError

StateAt = Callable[[int], dict[str, Tensor]]
Saved = Callable[..., Path]


def test_one_file_holds_weights_under_their_names(saved: Saved, state_at: StateAt, tmp_path: Path) -> None:
    (path,) = export(saved(6), 6, tmp_path / "out")
    tensors = load_file(path)
    assert set(tensors) == {"weight", "bias", "count", "nothing"}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state_at(6)[f"model.{name}"])
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "6"
        assert file.metadata()["format"] == "pt"


def test_many_bytes_become_parts_with_an_index(saved: Saved, state_at: StateAt, tmp_path: Path) -> None:
    paths = export(saved(6), 6, tmp_path / "out", max_file_bytes=2000)
    assert [path.name for path in paths] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(paths[-1].read_text())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "out" / file)[name], state_at(6)[f"model.{name}"])
    assert index["metadata"]["total_size"] == 33 * 17 * 4 + 33 * 2 + 8


def test_an_export_is_whole_or_not_there(saved: Saved, tmp_path: Path) -> None:
    directory = saved(6)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(UserError, match="not empty"):
        export(directory, 6, out)
    (out / "mine").unlink()
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        export(directory, 7, out)
    (directory / "step_00000006" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CorruptionError):
        export(directory, 6, out)
    assert list(out.iterdir()) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoints", "out"]
