from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bigtrain.checkpoint import commit, loader
from bigtrain.config import CorruptionError, UserError

StateAt = Callable[[int], dict[str, Tensor]]
Saved = Callable[..., Path]


def blank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 9) for name, tensor in state.items()}


def test_every_bit_comes_back_in_place(saved: Saved, state_at: StateAt) -> None:
    directory = saved(1, 2)
    target = blank(state_at(2))
    places = {name: tensor.data_ptr() for name, tensor in target.items()}
    manifest = loader.load(directory, 2, target)
    assert manifest.progress == {"step": 2}
    for name, tensor in state_at(2).items():
        assert torch.equal(target[name], tensor), name
        assert target[name].data_ptr() == places[name]


def test_plain_dcp_reads_what_we_write(saved: Saved, state_at: StateAt) -> None:
    target = blank(state_at(3))
    path = saved(3) / "step_00000003"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=path)
    for name, tensor in state_at(3).items():
        assert torch.equal(target[name], tensor), name


def test_the_newest_sound_checkpoint_is_found_with_a_warning(saved: Saved) -> None:
    directory = saved(1, 2, 3)
    shard = directory / "step_00000003" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[-500] ^= 1
    shard.write_bytes(content)
    found = loader.find(directory)
    assert found is not None
    assert found.step == 2
    assert found.manifest.progress == {"step": 2}
    assert "hash" in found.warnings[0]
    with pytest.raises(CorruptionError, match="step 3 is damaged"):
        loader.find(directory, 3)
    with pytest.raises(CorruptionError, match="step 3 is damaged"):
        loader.read_tensors(directory, 3)
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        loader.find(directory, 4)


def test_damaged_metadata_with_a_fitting_manifest_fall_back_too(saved: Saved) -> None:
    directory = saved(1, 2)
    (directory / "step_00000002" / ".metadata").unlink()
    found = loader.find(directory)
    assert found is not None
    assert found.step == 1


def test_nothing_saved_is_none_and_nothing_sound_is_an_error(saved: Saved, tmp_path: Path) -> None:
    assert loader.find(tmp_path / "absent") is None
    directory = saved(1)
    (directory / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(CorruptionError):
        loader.find(directory)


def test_names_shapes_and_dtypes_that_do_not_fit_are_reported_before_a_byte_is_read(
    saved: Saved, state_at: StateAt
) -> None:
    directory = saved(1)

    def refusal(state: dict[str, Tensor]) -> UserError:
        before = {name: tensor.clone() for name, tensor in state.items()}
        with pytest.raises(UserError) as caught:
            loader.load(directory, 1, state)
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
        return caught.value

    state = blank(state_at(1))
    missing = refusal(state | {"model.weights": torch.ones(1)})
    assert "'model.weights'" in missing.what
    assert "'model.weight'" in (missing.fix or "")
    error = refusal({name: tensor for name, tensor in state.items() if name != "model.bias"})
    assert "'model.bias'" in error.what
    assert "(33, 17)" in refusal(state | {"model.weight": torch.ones(17, 33)}).what
    assert "torch.float64" in refusal(state | {"model.weight": torch.ones(33, 17, dtype=torch.float64)}).what


def test_full_tensors_are_read_by_prefix(saved: Saved, state_at: StateAt) -> None:
    tensors = loader.read_tensors(saved(5), 5)
    assert set(tensors) == {"weight", "bias", "count", "nothing"}
    assert torch.equal(tensors["bias"], state_at(5)["model.bias"])


def test_listing_needs_no_verification(saved: Saved) -> None:
    assert [found.step for found in commit.list_checkpoints(saved(10, 20))] == [10, 20]
