"""Recurrent language models: every cell reads from left to right and continues texts."""

from __future__ import annotations

import pytest
import torch

from bigtrain.models.families.rnn import CELLS, Config
from bigtrain.models.sampling import Choice, generate

CONTEXT, VOCABULARY = 6, 9


@pytest.mark.parametrize("cell", CELLS)
def test_a_token_changes_what_follows_it_and_nothing_before(cell: str) -> None:
    torch.manual_seed(0)
    network = Config(cell=cell, context=CONTEXT, width=8, layers=1).build(VOCABULARY)
    tokens = torch.randint(VOCABULARY, (1, CONTEXT))
    changed = tokens.clone()
    changed[0, 3] = (tokens[0, 3] + 1) % VOCABULARY
    before, after = network(tokens), network(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).any(-1).all()


def test_it_continues_a_text_longer_than_its_context() -> None:
    torch.manual_seed(0)
    network = Config(context=CONTEXT, width=8, dropout=0.5).build(VOCABULARY)
    expected = [1, 2, 3]
    written = generate(network, torch.tensor([expected]), 5, Choice(0))
    network.eval()
    for _ in range(5):
        expected.append(int(network(torch.tensor([expected[-CONTEXT:]]))[0, -1].argmax()))
    assert written.tolist() == [expected]
