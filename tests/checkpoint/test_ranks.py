from __future__ import annotations

import pickle
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from bigtrain.checkpoint import loader
from bigtrain.testing.ranks import RankPool
from tests.checkpoint.save_and_load_at_ranks import load, save

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def test_four_ranks_save_and_agree_on_every_outcome(root: Path, ranks: RankPool) -> None:
    """Values of the step, failure of one rank, the save after it, a lost lease: asserted on each rank."""
    assert ranks.run(save, root, ranks=4) == [[3, 9]] * 4


def test_replicated_tensors_are_written_once_and_no_rank_writes_the_model(root: Path) -> None:
    path = root / "checkpoints" / "step_00000003"
    metadata = pickle.loads((path / ".metadata").read_bytes())  # noqa: S301 - written by this test
    expected = load_file(root / "expected.safetensors")
    assert set(metadata.state_dict_metadata) == set(expected)
    for name, entry in metadata.state_dict_metadata.items():
        assert sum(chunk.sizes.numel() for chunk in entry.chunks) == expected[name].numel(), name
    writers = {index.fqn: set() for index in metadata.storage_data}
    for index, place in metadata.storage_data.items():
        writers[index.fqn].add(place.relative_path)
    assert len(writers["model.embedding.weight"]) == 4
    assert len(writers["model.scale"]) == 1
    assert len({next(iter(writers[name])) for name in writers if name.endswith("step")}) > 1


def test_two_ranks_load_what_four_saved_and_agree_on_what_is_sound(root: Path, ranks: RankPool) -> None:
    assert ranks.run(load, root, ranks=2) == [9] * 2, "step 11 is damaged"


def test_one_process_and_plain_dcp_load_what_four_ranks_saved(root: Path) -> None:
    expected = load_file(root / "expected.safetensors")
    by_bigtrain = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    by_dcp = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    loader.load(root / "checkpoints", 3, by_bigtrain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(by_dcp, checkpoint_id=root / "checkpoints" / "step_00000003")
    for name, tensor in expected.items():
        assert torch.equal(by_bigtrain[name], tensor), name
        assert torch.equal(by_dcp[name], tensor), name


def test_a_rank_killed_in_a_save_is_noticed_by_the_others(root: Path, run_script: Callable[..., str]) -> None:
    run_script("save_and_load_at_ranks.py", root, ranks=2, expected={1: -signal.SIGKILL})
