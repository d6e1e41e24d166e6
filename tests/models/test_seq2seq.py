"""Sequence to sequence: what the encoder reads, what the decoder writes, and what counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bigtrain.models.families.seq2seq import Config

CONTEXT, VOCABULARY = 7, 9


@pytest.mark.parametrize("reverse", [False, True])
def test_each_answer_is_predicted_from_its_own_source(reverse: bool) -> None:
    torch.manual_seed(0)
    config = Config(context=CONTEXT, width=8, reverse=reverse)
    network = config.build(VOCABULARY)
    whole = torch.randint(VOCABULARY, (3, CONTEXT + 1))
    sources, answers = (1, 3, 5), (4, 2, 3)
    weights = torch.zeros(3, CONTEXT)
    for row, (source, answer) in enumerate(zip(sources, answers, strict=True)):
        weights[row, source - 1 : source - 1 + answer] = 1
    batch = {"tokens": whole[:, :-1], "targets": whole[:, 1:], "weights": weights}
    loss, weight, by_sequence = config.loss(network(**config.inputs(batch)), batch)
    expected = []
    for row, (source, answer) in enumerate(zip(sources, answers, strict=True)):
        read = whole[row, :source].flip(0) if reverse else whole[row, :source]
        _, state = network.encoder(network.embedding(read)[None])
        written = network.embedding(whole[row, source - 1 : source - 1 + answer])[None]
        logits = network.head(network.decoder(written, state)[0])[0]
        expected.append(F.cross_entropy(logits, whole[row, source : source + answer], reduction="sum"))
    assert by_sequence is not None
    torch.testing.assert_close(by_sequence[:, 0], torch.stack(expected).detach())
    torch.testing.assert_close(loss, sum(expected))
    assert weight == sum(answers)
