"""Learning rates and batches that measured laws propose for the sizes of a ladder, next to the values of its rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigtrain.config import UserError
from bigtrain.scaling.decide import read_rates
from bigtrain.scaling.rates import PowerLaw, rate_laws
from bigtrain.scaling.runs.readers import read_source
from bigtrain.sweeps.journal import SweepDirectory
from bigtrain.sweeps.ladder import Rung


def propose(
    rungs: Sequence[Rung], steps: Sequence[Sequence[int]], rates: Path | None, directory: SweepDirectory
) -> dict[str, Any] | None:
    """The learning rate and batch that laws propose for each size, and the ladder's rules that fit the proposals.

    Args:
        rungs: The sizes.
        steps: For each size, the numbers of steps of its runs. All runs of a size share one learning rate, so the laws
            are evaluated at the geometric mean of their D.
        rates: A rates.json or its directory; None: the law of the sweep's own tuning runs, if it has some.
        directory: The sweep's directory.

    Returns:
        A dict with `source`, `sizes` and `rules`; or with `source` and `refused`, the reason why there is no law; or
        None if there are neither `rates` nor tuning runs.

    Raises:
        UserError: `rates` is not a file of such laws.
    """
    if rates is not None:
        laws, source = read_rates(rates), str(rates)
    elif directory.tuning.exists():
        source = str(directory.tuning)
        try:
            found = rate_laws(read_source(str(directory.path), rows="tuning"), "drop")
        except UserError as error:
            return {"source": source, "refused": error.what}
        laws = {name: PowerLaw.parse(found[name]["law"]) for name in ("lr",) if name in found}
    else:
        return None
    rows = [_row(one, lengths, laws) for one, lengths in zip(rungs, steps, strict=True)]
    rules = {name: rule for name in ("batch", "lr") if (rule := _rule(rows, name)) is not None}
    return {"source": source, "sizes": rows, "rules": rules}


def _row(one: Rung, steps: Sequence[int], laws: dict[str, PowerLaw]) -> dict[str, Any]:
    tokens = float(np.exp(np.mean(np.log(np.array(steps) * one.batch_tokens))))
    at = {"params": float(one.params), "tokens": tokens, "batch": float(one.batch_tokens)}
    row: dict[str, Any] = {"size": one.target, **at, "rule": {"lr": one.lr, "batch": one.batch_tokens}}
    if "batch" in laws:
        row["best_batch"] = laws["batch"].at(tokens=tokens)
        at["batch"] = row["best_batch"]["value"]
    if "lr" in laws:
        row["best_lr"] = laws["lr"].at(**{name: at[name] for name in laws["lr"].names})
    return row


def _rule(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float] | None:
    """The ladder's rule value * (N / at)^exponent that is fitted to the proposals of all sizes."""
    known = [row for row in rows if f"best_{name}" in row]
    if not known:
        return None
    params = np.log([row["params"] for row in known])
    best = np.log([row[f"best_{name}"]["value"] for row in known])
    exponent = float(np.polyfit(params, best, 1)[0]) if len(known) > 1 else 0.0
    value = float(np.exp(best.mean()))
    return {"value": float(f"{value:.3g}"), "at": float(f"{np.exp(params.mean()):.3g}"),
            "exponent": round(exponent, 3)}  # fmt: skip


def proposal_lines(found: dict[str, Any] | None) -> list[str]:
    """The proposals as lines of text; an empty list if there are none."""
    if found is None:
        return []
    if "refused" in found:
        return [f"rates   {found['source']} has no law: {found['refused']}"]
    lines = [f"rates   by {found['source']}:"]
    for row in found["sizes"]:
        for name, label in (("lr", "learning rate"), ("batch", "batch in tokens")):
            if best := row.get(f"best_{name}"):
                low, high = best["interval"]
                outside = f", outside the fitted {' and '.join(best['outside'])}" if best["outside"] else ""
                lines.append(
                    f"  {row['size']:,}: {label} {best['value']:.3g}  95 % [{low:.3g}, {high:.3g}], by the rule "
                    f"{row['rule'][name]:.3g}{outside}"
                )
    lines += [f"  as a rule, ladder.{name}: {{value: {rule['value']:g}, at: {rule['at']:.0f}, exponent: "
              f"{rule['exponent']:g}}}" for name, rule in found["rules"].items()]  # fmt: skip
    return lines
