"""Quantities as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from bigtrain.config import BatchSize, Bytes, Count, Duration
from bigtrain.config.units import parse_bytes, split_quantity

SUFFIXES = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
UNITS = {
    "step": "steps", "steps": "steps", "token": "tokens", "tokens": "tokens", "sample": "samples",
    "samples": "samples", "epoch": "epochs", "epochs": "epochs", "s": "seconds", "sec": "seconds",
    "second": "seconds", "seconds": "seconds", "min": "minutes", "minute": "minutes", "minutes": "minutes",
    "h": "hours", "hour": "hours", "hours": "hours",
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "factor"), SUFFIXES.items())
def test_every_suffix_multiplies_by_its_power(suffix: str, factor: int) -> None:
    assert split_quantity(f"3{suffix} tokens") == (3 * factor, "tokens")
    assert split_quantity(f"3 {suffix}  tokens") == (3 * factor, "tokens")
    assert parse_bytes(f"3 {suffix}B") == parse_bytes(f"3{suffix}B") == parse_bytes(f"3{suffix}") == 3 * factor
    assert TypeAdapter(Count).validate_python(f"3{suffix}") == 3 * factor


@pytest.mark.parametrize(("written", "unit"), UNITS.items())
def test_every_unit_is_known_with_and_without_a_space(written: str, unit: str) -> None:
    assert Duration.parse(f"12 {written}") == Duration.parse(f"12{written}") == Duration(12.0, unit)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1_000 steps", 1000), ("1e3 steps", 1000), ("1.5k steps", 1500), ("  7   steps ", 7), ("2.5e-1 ki tokens", 256)],
)
def test_numbers_may_be_written_in_any_usual_way(text: str, value: int) -> None:
    assert Duration.parse(text).value == value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (10, "has no unit: write for example '10 steps'"),
        (1.5, "no unit"),
        (True, "no unit"),
        (None, "no unit"),
        ("10", "no unit"),
        ("10 parsecs", "unknown unit 'parsecs'"),
        ("10 Steps", "unknown unit 'Steps'"),
        ("10 ksteps", "unknown unit 'ksteps'"),
        ("10 K steps", "unknown unit 'K steps'"),
        ("1.5.2 steps", "unknown unit"),
        ("steps", "not a number with a unit"),
        ("-3 steps", "not a number with a unit"),
        ("", "not a number with a unit"),
        ("1.5 steps", "not a whole number"),
        ("1e400 steps", "not a finite number"),
        ("nan steps", "not a number with a unit"),
    ],
)
def test_what_is_no_duration_is_refused_with_its_text(value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Duration.parse(value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0, "at least 1"),
        (-4, "not a number"),
        (12.0, "not a batch size"),
        (True, "not a batch size"),
        ("12 epochs", "unknown unit 'epochs'"),
        ("1.5 tokens", "not a whole number"),
        (None, "not a batch size"),
    ],
)
def test_what_is_no_batch_size_is_refused(value: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BatchSize.parse(value)


@pytest.mark.parametrize("text", ["", "GB", "5 iB", "5 XB", "5 GB more", "1e999 GB", "-5 GB", "0.5 B"])
def test_what_is_no_size_in_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Bytes).validate_python(text)


@pytest.mark.parametrize("text", ["64 tokens", "1.5", "x", "-1k"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Count).validate_python(text)


whole_units = st.sampled_from(["steps", "tokens", "samples"])
part_units = st.sampled_from(["epochs", "seconds", "minutes", "hours"])
durations = st.one_of(
    st.builds(lambda value, unit: Duration(float(value), unit), st.integers(0, 2**53), whole_units),
    st.builds(Duration, st.floats(0, 1e300), part_units),
)


@given(durations)
def test_a_duration_reads_back_from_its_own_text(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration


@given(st.builds(BatchSize, st.integers(1, 2**53), st.sampled_from(["sequences", "tokens"])))
def test_a_batch_size_reads_back_from_its_yaml_value(size: BatchSize) -> None:
    assert BatchSize.parse(size._plain()) == size
    assert BatchSize.parse(str(size)) == size


@given(
    duration=st.builds(lambda value, unit: Duration(float(value), unit), st.integers(0, 10**12), whole_units),
    tokens=st.integers(1, 10**6),
    sequences=st.integers(1, 10**4),
)
def test_the_steps_of_a_duration_are_the_fewest_that_cover_it(duration: Duration, tokens: int, sequences: int) -> None:
    steps = duration.in_steps(tokens, sequences, None)
    per_step = {"steps": 1, "tokens": tokens, "samples": sequences}[duration.unit]
    assert (steps - 1) * per_step < duration.value <= steps * per_step or duration.value == steps == 0


def test_steps_of_epochs_need_the_size_of_the_data_and_times_have_none() -> None:
    assert Duration.parse("1.5 epochs").in_steps(320, 10, 101) == 16
    with pytest.raises(ValueError, match="known size"):
        Duration.parse("1 epoch").in_steps(320, 10, None)
    with pytest.raises(ValueError, match="is a time"):
        Duration.parse("5 min").in_steps(320, 10, 101)
    assert (Duration.parse("2 h").seconds, Duration.parse("90 s").is_time) == (7200.0, True)


def test_a_batch_in_tokens_names_the_next_size_that_divides() -> None:
    assert BatchSize.parse("512k tokens").sequences(1000) == 512
    assert BatchSize.parse(12).sequences(1000) == 12
    with pytest.raises(ValueError, match="96 tokens would be"):
        BatchSize.parse("100 tokens").sequences(32)
