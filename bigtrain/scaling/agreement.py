"""The test whether the approaches agree, by the bootstrap intervals of their differences."""

from __future__ import annotations

import math
from typing import Any

from bigtrain.scaling.approaches import Result
from bigtrain.scaling.bootstrap import interval

LEVEL = 0.95
"""Level of all comparisons together; each comparison has an equal share of the error (Bonferroni)."""


def agreement(found: dict[str, Result]) -> dict[str, Any]:
    """Compare the exponent a and N* at the target between approaches, by paired bootstrap replicates.

    Two approaches agree if the interval of the difference of a contains 0 and that of the ratio of N* contains 1. The
    intervals of approach 2 are widened by the effect of its choice of a window, which resampling does not show. The
    loss functions of approach 3 count as one approach; its first loss function is compared with the others.

    Args:
        found: Results by the name of the approach.

    Returns:
        Plain values for JSON. `agree` is whether all pairs agree, or None without pairs; `pairs` has their comparisons.
    """
    known = {name: one for name, one in found.items() if one.exponent is not None}
    parametric = [name for name in known if name.startswith("a3")]
    names = [name for name in known if name not in parametric[1:]]
    couples = [(first, second) for i, first in enumerate(names) for second in names[i + 1 :]]
    couples += [(parametric[0], other) for other in parametric[1:]]
    level = 1 - (1 - LEVEL) / max(2 * len(couples), 1)
    pairs = [_pair(first, known[first], second, known[second], level) for first, second in couples]
    return {"agree": all(pair["agree"] for pair in pairs) if pairs else None, "level": level, "pairs": pairs}


def _pair(first: str, one: Result, second: str, other: Result, level: float) -> dict[str, Any]:
    assert one.exponent is not None
    assert other.exponent is not None
    assert one.ln_params is not None
    assert other.ln_params is not None
    paired = min(len(one.exponent), len(other.exponent))
    spread = one.window_spread[0] + other.window_spread[0], one.window_spread[1] + other.window_spread[1]
    low, high = interval(one.exponent[:paired] - other.exponent[:paired], level)
    difference = [low - spread[0], high + spread[0]]
    low, high = interval(one.ln_params[:paired] - other.ln_params[:paired], level)
    ratio = [math.exp(low - spread[1]), math.exp(high + spread[1])]
    target = one.result["target"]["params"]["value"] / other.result["target"]["params"]["value"]
    return {
        "first": first, "second": second, "exponent_difference": one.result["a"] - other.result["a"],
        "exponent_difference_interval": difference, "params_ratio_at_target": target, "params_ratio_interval": ratio,
        "agree": difference[0] <= 0 <= difference[1] and ratio[0] <= 1 <= ratio[1],
    }  # fmt: skip
