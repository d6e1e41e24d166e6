"""What the stages of a pipeline hold, exchange and name, on real ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.engines.fsdp.engine import FSDPEngine
from bigtrain.models.config import FAMILIES
from bigtrain.optim.config import OptimizerConfig
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.equivalence import How, What, micro_batches
from bigtrain.testing.ranks import RankError, RankPool

LAYERS = 4
WHAT = What({"arch": "llama", "layers": LAYERS, "width": 32, "heads": 4, "mlp_width": 48, "tied": True}, batch=12)
INTERLEAVED = {"pp": 2, "pp_schedule": "interleaved", "pp_stages_per_rank": 2}


def build(layout: dict[str, Any], optimizer: OptimizerConfig | None = None) -> Any:
    return FSDPConfig().build(
        FAMILIES["llama"](**WHAT.model, context=WHAT.context),
        WHAT.vocabulary,
        optimizer or AdamWConfig(lr=1e-3),
        layout=LayoutConfig(**layout),
        precision="fp32",
        seed=1,
        ranks=Ranks.from_environment(),
    )


def batches(engine: FSDPEngine, layout: dict[str, Any], step: int, micro_size: int = 2) -> Any:
    how = How(layout=layout, micro_size=micro_size)
    return micro_batches(WHAT, how, step, engine.data_parallel_rank, engine.data_parallel_size)


def names_held(layout: dict[str, Any]) -> tuple[list[str], int]:
    """Names of this rank's parameters, and their bytes."""
    engine = build(layout)
    parameters = dict(engine.model.named_parameters())
    engine.close()
    return list(parameters), sum(parameter.numel() * 4 for parameter in parameters.values())


@pytest.mark.parametrize(("layout", "layers"), [({"pp": 2}, ["01", "23"]), (INTERLEAVED, ["02", "13"])])
def test_a_rank_holds_its_own_stages_alone_under_the_names_of_one_process(
    ranks: RankPool, layout: dict[str, Any], layers: list[str]
) -> None:
    with torch.device("meta"):
        whole = FAMILIES["llama"](**WHAT.model, context=WHAT.context).build(WHAT.vocabulary)
    sizes = {name: parameter.numel() * 4 for name, parameter in whole.named_parameters()}
    for rank, (names, size) in enumerate(ranks.run(names_held, layout, ranks=2)):
        ends = [["embedding.weight"], ["embedding.weight", "norm.weight"]][rank]
        expected = {name for name in sizes if name in ends or name.split(".")[1] in layers[rank]}
        assert set(names) == expected
        assert len(names) == len(expected)
        assert size == sum(sizes[name] for name in expected)


class Counting(TorchDispatchMode):
    """Counts what is given to the process groups, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives(layout: dict[str, Any], micro_size: int) -> Counter[str]:
    """What a step after the first gives to the process groups, by kind."""
    engine = build(layout)
    engine.train_step(0, batches(engine, layout, 0, micro_size), lr=1e-3).read()
    with Counting() as counted:
        engine.train_step(1, batches(engine, layout, 1, micro_size), lr=1e-3).read()
    engine.close()
    return counted.counts


@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 2},
        pytest.param(INTERLEAVED, marks=pytest.mark.slow),
        pytest.param({"pp": 2, "pp_schedule": "zero_bubble"}, marks=pytest.mark.slow),
    ],
)
def test_parameters_are_gathered_and_gradients_reduced_once_a_step_however_many_micro_batches(
    ranks: RankPool, layout: dict[str, Any]
) -> None:
    """Two data-parallel ranks a stage; a group of parameters is a block, or what else a stage holds."""
    for micro_size in (3, 1):
        for rank, found in enumerate(ranks.run(collectives, layout, micro_size, ranks=4)):
            # Blocks, and the embedding or the norm and the embedding of the stages at the ends.
            groups = LAYERS // 2 + 1
            assert found["_allgather_base_"] == groups, (rank, found)
            assert found["_reduce_scatter_base_"] == groups, (rank, found)
            # The tied embedding's gradient; what a step sums.
            assert found["allreduce_"] == 2, (rank, found)
            n_micro = WHAT.batch // 2 // micro_size
            borders = layout.get("pp_stages_per_rank", 1) * 2 - 1
            assert found["send"] == found["recv_"] == borders * n_micro, (rank, found)


def losses_of_evaluations(layout: dict[str, Any]) -> list[tuple[float, float]]:
    """Before, between and after steps, with other numbers and sizes of micro-batches than the steps'."""
    engine = build(layout)
    found = []
    for step, size in enumerate((1, 12, 5)):
        found.append(engine.evaluate(iter([batches(engine, {}, 90, size), batches(engine, {}, 91, size)])).sums)
        engine.train_step(step, batches(engine, layout, step), lr=1e-3)
    engine.close()
    return found


def test_evaluation_takes_any_number_of_micro_batches_between_steps(ranks: RankPool) -> None:
    (expected,) = ranks.run(losses_of_evaluations, {}, ranks=1)
    for layout in ({"pp": 2}, INTERLEAVED):
        for found in ranks.run(losses_of_evaluations, layout, ranks=2):
            for (loss, weight), (expected_loss, expected_weight) in zip(found, expected, strict=True):
                assert loss == pytest.approx(expected_loss, rel=1e-5)
                assert weight == expected_weight


def weights_after_steps(layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = build(layout)
    for step in range(3):
        engine.train_step(step, batches(engine, layout, step), lr=1e-2)
    weights = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    engine.close()
    return weights


def test_steps_repeat_to_the_bit_and_both_copies_of_a_tied_embedding_stay_equal(ranks: RankPool) -> None:
    once, again = (ranks.run(weights_after_steps, {"pp": 3, "pp_split": (2, 1, 1)}, ranks=3) for _ in range(2))
    for mine, repeated in zip(once, again, strict=True):
        assert all(torch.equal(mine[name], repeated[name]) for name in mine | repeated)
    assert torch.equal(once[0]["embedding.weight"], once[2]["embedding.weight"])
    assert "embedding.weight" not in once[1]


def groups_built(pattern: str) -> list[int]:
    """Parameters in each group of the optimizer on this rank."""
    optimizer = AdamWConfig(lr=1e-3, groups=({"pattern": pattern, "lr_scale": 0.5},))
    engine = build({"pp": 2}, optimizer)
    sizes = [len(group["params"]) for group in engine.optimizer.param_groups if group["lr_scale"] == 0.5]
    engine.close()
    return sizes


def test_a_pattern_may_match_on_one_stage_alone_but_must_match_somewhere(ranks: RankPool) -> None:
    assert ranks.run(groups_built, "layers.3.mlp.up.weight", ranks=2) == [[], [1]]
    with pytest.raises(RankError, match="matches no parameter"):
        ranks.run(groups_built, "layers.4.mlp.up.weight", ranks=2)


def error_in_the_last_stage() -> None:
    engine = build({"pp": 2})
    if dist.get_rank() == 1:
        engine.model[0].forward_stage = lambda x, batch: x / 0
    engine.train_step(0, batches(engine, {"pp": 2}, 0), lr=1e-3)


def test_an_error_in_a_stage_is_raised_there_with_its_cause(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(error_in_the_last_stage, ranks=2)
    assert caught.value.rank == 1
