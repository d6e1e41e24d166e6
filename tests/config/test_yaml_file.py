"""YAML by the 1.2 core schema, line by line."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import UserError
from bigtrain.config.yaml_file import YamlDocument, dump, parse, parse_value


def value_of(text: str) -> Any:
    return parse(f"key: {text}\n", "run.yaml").value["key"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E3", 1000.0), ("+1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("-.inf", -math.inf),
        ("12", 12), ("-7", -7), ("0o17", 15), ("0x1F", 31), ("010", 10),
        ("true", True), ("False", False), ("TRUE", True), ("null", None), ("~", None), ("", None), ("Null", None),
        ("off", "off"), ("on", "on"), ("no", "no"), ("yes", "yes"), ("y", "y"), ("tRue", "tRue"),
        ("1_000", "1_000"), ("12:30:45", "12:30:45"), ("2001-12-14", "2001-12-14"), ("0b1", "0b1"),
        ("1e", "1e"), ("e3", "e3"), ("'1'", "1"), ('"true"', "true"), ("<<", "<<"), ("=", "="),
        ("[1, [two, 3.0]]", [1, ["two", 3.0]]), ("{a: {b: off}}", {"a": {"b": "off"}}),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    found = value_of(text)
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(value_of(".nan"))


def test_every_key_and_item_knows_its_line() -> None:
    text = "# a comment\nname: x\nmodel:\n  arch: gpt2\n\n  rope:\n    factor: 2\nlist:\n- 1\n- {a: 1,\n   b: 2}\n"
    document = parse(text, "run.yaml")
    assert document.lines == {
        (): 0, ("name",): 2, ("model",): 3, ("model", "arch"): 4, ("model", "rope"): 6, ("model", "rope", "factor"): 7,
        ("list",): 8, ("list", 0): 9, ("list", 1): 10, ("list", 1, "a"): 10, ("list", 1, "b"): 11,
    }  # fmt: skip
    assert document.where(("model", "rope", "factor")) == "run.yaml, line 7"
    assert document.where(("model", "rope", "absent", "deeper")) == "run.yaml, line 6"
    assert document.where(("absent",)) == "run.yaml"


ALIASES = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
"""Ten million numbers in seven lines."""


@pytest.mark.parametrize(
    ("text", "says", "where"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' appears twice", "run.yaml, line 3"),
        ("a:\n  b: 1\n  'b': 2\n", "'b' appears twice", "run.yaml, line 3"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", "not YAML|tag", "run.yaml"),
        ("a: !!python/name:os.system x\n", "tag .* is not allowed", "run.yaml, line 1"),
        ("a: 1\nb: !secret x\n", "tag '!secret' is not allowed", "run.yaml, line 2"),
        ("a: !!timestamp 2001-12-14\n", "tag .* is not allowed", "run.yaml, line 1"),
        ("? [1, 2]\n: x\n", "key must be a plain text", "run.yaml, line 1"),
        ("a: [1, 2\nb: 3\n", "not YAML", "run.yaml, line 2"),
        ("a: b: c\n", "not YAML: mapping values are not allowed here", "run.yaml, line 1"),
        ("a: *nothing\n", "undefined alias", "run.yaml, line 1"),
        ("a: 1\n---\nb: 2\n", "single document", "run.yaml, line 2"),
        ("a: \x00\n", "not YAML", "run.yaml"),
        ("- 1\n", "must be a mapping", "run.yaml, line 1"),
        ("just text\n", "must be a mapping", "run.yaml, line 1"),
        ("# nothing\n", "empty", "run.yaml"),
        ("", "empty", "run.yaml"),
        ("a: &x [*x]\n", "nested too deeply", "run.yaml"),
        ("a: " + "[" * 50 + "]" * 50, "nested too deeply", "run.yaml"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply", "run.yaml"),
        (ALIASES, "too large", "run.yaml"),
    ],
)  # fmt: skip
def test_what_a_config_must_not_hold_is_refused_with_its_line(text: str, says: str, where: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        parse(text, "run.yaml")
    assert (caught.value.where or "").startswith(where)


def test_tags_of_sequences_and_mappings_are_refused_too() -> None:
    for text in ("a: !set {x, y}\n", "a: !!python/tuple [1, 2]\n", "a: !!omap [x: 1]\n", "!!python/dict {a: 1}\n"):
        with pytest.raises(UserError, match="tag"):
            parse(text, "run.yaml")


def test_a_value_of_the_command_line_is_read_like_one_of_the_file() -> None:
    assert [parse_value(text) for text in ("1e-3", "off", "", "{a: 1}", "512k tokens")] == [
        0.001, "off", None, {"a": 1}, "512k tokens",
    ]  # fmt: skip
    with pytest.raises(UserError, match="not a single value"):
        parse_value("1\nname: x")


texts = st.text(st.characters(codec="utf-8"), max_size=12)
awkward = st.sampled_from(
    ["off", "1e5", "0o7", "0x1F", "~", "", "null", "true", ".inf", "<<", "=", "- a", "a: b", "#", " x "]
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=True), texts, awkward
)
keys = st.one_of(texts, awkward)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=10,
)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


@given(st.dictionaries(keys, values, min_size=1, max_size=3))
@settings(deadline=None, max_examples=200)
def test_what_is_dumped_parses_to_the_same_values_types_and_order(value: dict[str, Any]) -> None:
    assert same(parse(dump(value), "run.yaml").value, value)


def test_a_value_that_stands_twice_is_written_out_twice() -> None:
    shared = ["x"]
    assert "&" not in dump({"a": shared, "b": shared})


def test_an_override_takes_the_place_of_everything_below_it() -> None:
    document = parse("a:\n  b:\n    c: 1\nd: null\n", "run.yaml")
    document.override(("a", "b"), {"x": 2})
    document.override(("d", "e"), 3)
    assert document.value == {"a": {"b": {"x": 2}}, "d": {"e": 3}}
    assert document.where(("a", "b", "x")) == document.where(("d", "e")) == "command line"
    assert document.where(("a",)) == "run.yaml, line 1"
    with pytest.raises(UserError, match=r"'d\.e' has no keys, so 'd\.e\.f' cannot be set"):
        document.override(("d", "e", "f"), 1)


def test_a_document_starts_with_no_lines() -> None:
    assert YamlDocument({}, "run.yaml").where(("a",)) == "run.yaml"
