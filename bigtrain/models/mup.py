"""muP, the maximal update parametrization: a learning rate that is best at one width is near the best at others.

Yang et al. 2022 (Tensor Programs V), table 8, which allows a tied head, for Adam. All factors are relative to a base
width, at which the model is the standard one to the bit. With m = width / base_width:

    parameters                           first std       learning rate   weight decay
    hidden: matrices of the blocks       / sqrt(m)       / m             * m
    embeddings, head, norms, biases      unchanged       unchanged       unchanged

The logits are divided by m (the head's bias is not), and scores of attention by the width of a head in place of its
root, relative to a base head. Learning rate times weight decay stays, as in the authors' MuAdamW: decoupled decay moves
weights by their product, and its inverse is the number of steps that the weights remember (Wang and Aitchison 2024).
The inputs of each hidden matrix (the heads together, the MLP's channels) are taken to grow as the width does.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from bigtrain.config import Section


class MupConfig(Section):
    """The width at which the standard parametrization and muP are the same."""

    base_width: Annotated[int, Ge(1)]
    """Width at which learning rate and initial weights were tuned."""
    base_head_width: Annotated[int, Ge(1)] | None = None
    """Width of a head there; null: that of this model, as where wider models have more heads of one width."""
