"""muP, the maximal update parametrization: the best learning rate at one width is nearly the best at other widths.

Yang et al. 2022 (Tensor Programs V), table 8, for Adam; this table allows a tied head. All factors are relative to a
base width, at which the model equals the standard parametrization bit for bit. With m = width / base_width:

    parameters                           initial std     learning rate   weight decay
    hidden: matrices of the blocks       / sqrt(m)       / m             * m
    embeddings, head, norms, biases      unchanged       unchanged       unchanged

The logits are divided by m, but the head's bias is not. Attention scores are divided by the width of a head instead of
its square root, relative to the base head width.

The product of learning rate and weight decay stays constant, as in the authors' MuAdamW. Decoupled weight decay
shrinks the weights by this product in each step; its inverse is the number of steps that the weights remember (Wang and
Aitchison 2024). The number of inputs of each hidden matrix (all heads together, the MLP's hidden channels) is assumed
to grow in proportion to the width.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from bigtrain.config import Section


class MupConfig(Section):
    """The base width of muP, at which it equals the standard parametrization."""

    base_width: Annotated[int, Ge(1)]
    """Width of the model for which learning rate and initial weights were tuned."""
    base_head_width: Annotated[int, Ge(1)] | None = None
    """Width of one head at the base width; null: as in this model, for models that widen by adding heads."""
