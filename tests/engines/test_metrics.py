"""Named values: how they are reduced, and that ranks which do not record the same names still agree."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bigtrain.config import UserError
from bigtrain.engines.contract import StepNumbers
from bigtrain.engines.step import StepReducer
from bigtrain.metrics import Metric, Recorder, Value, record_metric, wants_metric
from bigtrain.models.contract import LossSum
from bigtrain.models.sums import Sums
from bigtrain.testing.ranks import RankPool

CPU = torch.device("cpu")


def step(reducer: StepReducer, weight: float = 1.0) -> StepNumbers:
    sums = Sums(CPU)
    sums.add(LossSum(torch.tensor(2.0), torch.tensor(weight)), {})
    total = reducer.reduce(torch.zeros((), dtype=torch.float64), 0.0, sums)
    return total.result(total.square, total.bad()).read()


def results(numbers: StepNumbers) -> dict[str, float | None]:
    return {name: value.result for name, value in numbers.metrics.items()}


def test_values_are_reduced_over_calls_and_entries() -> None:
    reducer = StepReducer(CPU)
    with reducer.recorder.active():
        for values, weights in (((1.0, 3.0), (1.0, 0.0)), ((5.0, 7.0), (1.0, 2.0))):
            tensor, weight = torch.tensor(values, requires_grad=True), torch.tensor(weights)
            record_metric("sum", tensor, "sum")
            record_metric("weighted", tensor, "sum", weight=weight)
            record_metric("mean", tensor, weight=weight)
            record_metric("plain mean", tensor)
            record_metric("max", tensor, "max")
            record_metric("min", tensor, "min")
            record_metric("norm", tensor, "norm")
        record_metric("number", 4, "max", unit="W")
    assert results(step(reducer)) == {
        "sum": 16, "weighted": 20, "mean": 5, "plain mean": 4, "max": 7, "min": 1, "norm": pytest.approx(84**0.5),
        "number": 4,
    }  # fmt: skip
    assert set(results(step(reducer)).values()) == {None}, "the next step starts anew"


def test_outside_of_a_step_and_in_a_backward_pass_nothing_is_recorded() -> None:
    record_metric("lost", 1.0)
    recorder = Recorder(CPU)
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda gradient: record_metric("again", gradient))
    with recorder.active():
        (2 * x).sum().backward()
    assert not recorder.metrics
    assert not wants_metric("lost")


def test_one_name_has_one_reduction_and_one_unit() -> None:
    with Recorder(CPU).active():
        record_metric("a", 1.0, "sum")
        with pytest.raises(UserError, match=r"'a' is recorded as max"):
            record_metric("a", 1.0, "max")
        with pytest.raises(UserError, match="'median'"):
            record_metric("b", 1.0, "median")  # type: ignore[arg-type]


def test_a_loss_scale_is_removed_from_weights_and_from_nothing_else() -> None:
    reducer = StepReducer(CPU)
    reducer.recorder.weight_scale = torch.tensor(8.0)
    with reducer.recorder.active():
        record_metric("tokens", 1.0, "sum", weight=torch.tensor([8.0, 8.0, 0.0]).sum())
        record_metric("calls", 1.0, "sum")
    assert results(step(reducer)) == {"tokens": 2, "calls": 1}


def test_steps_are_merged_by_the_reduction() -> None:
    def merged(reduction: str, *pairs: tuple[float, float]) -> float | None:
        value = Value(Metric("x", reduction), *pairs[0])  # type: ignore[arg-type]
        for pair in pairs[1:]:
            value = value.merged(Value(value.metric, *pair))
        assert Value.from_plain(value.as_plain()) == value
        return value.result

    assert merged("mean", (6.0, 2.0), (0.0, 0.0), (3.0, 1.0)) == 3
    assert merged("sum", (6.0, 2.0), (3.0, 1.0)) == 9
    assert merged("max", (6.0, 1.0), (3.0, 1.0)) == 6
    assert merged("min", (6.0, 1.0), (3.0, 1.0), (0.0, 0.0)) == 3
    assert merged("norm", (9.0, 1.0), (4.0, 1.0)) == 2
    assert merged("mean", (0.0, 0.0)) is None


def of_some_ranks() -> list[dict[str, float | None]]:
    """Each rank has a name of its own, and rank 1 records a new one in the second step."""
    rank = dist.get_rank()
    reducer = StepReducer(CPU, rank, dist.get_world_size())
    found = []
    for number in range(4):
        with reducer.recorder.active(of_ranks=True):
            record_metric(f"of rank {rank}", 10.0 * rank + number, "max")
            record_metric("rank", float(rank), "min")
            if rank and number == 1:
                record_metric("late", 5.0, "sum")
        numbers = step(reducer)
        found.append(results(numbers))
        if numbers.unknown:
            reducer.agree()
    return found


def test_ranks_that_record_other_names_agree_on_all_of_them(ranks: RankPool) -> None:
    found = ranks.run(of_some_ranks, ranks=2)
    assert found[0] == found[1]
    for number, row in enumerate(found[0]):
        assert (row["of rank 0"], row["of rank 1"], row["rank"]) == (number, 10 + number, 0)
    assert "late" not in found[0][1]
    assert [row["late"] for row in found[0][2:]] == [5, None], "it travels with the step after it is known"


def test_a_step_in_which_no_token_counts_is_skipped_and_has_finite_numbers() -> None:
    numbers = step(StepReducer(CPU), weight=0.0)
    assert (numbers.skipped, numbers.weight, numbers.gradient_norm, numbers.loss) == (1, 0, 0, 2)
    assert not numbers.overflowed
