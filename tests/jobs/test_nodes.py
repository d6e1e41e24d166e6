"""Which nodes a run takes, in which order, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from bigtrain.jobs.nodes import UNLIMITED, Need, Node, NodeKind, choose, missing

NEED = Need((3, 2), {"CPU": 2})


def node(name: str, host: str = "", rack: str = "", free: float = 2, total: float = 2) -> Node:
    return Node(name, host or f"host-{name}", {"rack": rack} if rack else {}, {"CPU": total}, {"CPU": free})


def nodes(names: Iterable[str]) -> list[Node]:
    return [node(name) for name in names]


def names(chosen: list[Node] | None) -> str | None:
    return None if chosen is None else "".join(node.name for node in chosen)


@pytest.mark.parametrize(
    ("there", "previous", "expected"),
    [
        ("dcba", "", "abc"),
        ("cb", "", "bc"),
        ("a", "", None),
        ("abcd", "cab", "cab"),
        # A lost node's place goes to the new one, and to no other.
        ("abd", "cab", "dab"),
        # None spare: the others close up, in their order.
        ("ab", "cba", "ba"),
        # The third comes back, under another name: the others stay where they are.
        ("abe", "ba", "bae"),
        ("xyz", "abc", "xyz"),
    ],
)
def test_survivors_keep_their_place(there: str, previous: str, expected: str | None) -> None:
    assert names(choose(nodes(there), NEED, previous)) == expected


def test_only_legal_sizes_are_taken() -> None:
    need = Need((4, 2), {"CPU": 2})
    assert names(choose(nodes("abc"), need)) == "ab"
    assert names(choose(nodes("abc"), need, "abcd")) == "ab"
    assert names(choose(nodes("abcde"), need, "ab")) == "abcd"


def test_busy_small_and_avoided_nodes_are_not_taken() -> None:
    some = [node("a", free=1), node("b", total=1, free=1), *nodes("cde")]
    assert names(choose(some, NEED, avoid={"d"})) == "ce"


def test_nodes_of_one_rack_are_taken_together_and_ordered_by_rack_host_and_name() -> None:
    need = Need((2,), {"CPU": 2}, topology="rack")
    racks = [node("a", rack="2"), node("b", rack="1"), node("c", rack="3"), node("d", rack="3")]
    assert names(choose(racks, need)) == "cd"
    assert names(choose([*racks, node("e", rack="2")], need, "xa")) == "ea", "the new one is from the survivor's rack"
    wide = Need((4,), {"CPU": 2}, topology="rack")
    assert names(choose(racks, wide)) == "bacd"


def test_labels_are_required() -> None:
    need = Need((1,), {"CPU": 2}, {"rack": "1"})
    assert names(choose([node("a", rack="2"), node("b", rack="1"), node("c")], need)) == "b"


def test_what_never_fits_differs_from_what_is_not_there_yet() -> None:
    gpus = Need((2,), {"GPU": 8})
    never = missing(nodes("ab"), gpus, None, {})
    assert never.never
    assert "2 nodes with 8 GPU each" in never.text
    assert "at most 0 GPU on one" in never.text
    busy = missing([node("a", free=0), node("b"), node("c", free=0)], NEED, None, {"b": "does not answer"})
    assert not busy.never
    assert "the run needs 2 nodes with 2 CPU each, but 0 are free" in busy.text
    assert "host-a, host-c in use" in busy.text
    assert "host-b does not answer" in busy.text


@pytest.mark.parametrize(
    ("kind", "never"),
    [
        (NodeKind(5, {"CPU": 2}), False),
        (NodeKind(1, {"CPU": 2}), True),
        (NodeKind(5, {"CPU": 1}), True),
        (NodeKind(UNLIMITED, {"CPU": 4}), False),
    ],
)
def test_what_an_autoscaler_can_bring_is_counted(kind: NodeKind, never: bool) -> None:
    lacking = missing(nodes("a"), NEED, [kind], {})
    assert lacking.never is never
    assert ("requested from the autoscaler" in lacking.text) is not never
