"""How a plain module is called: its arguments, taken from a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import UserError
from bigtrain.models.contract import Batch

_SAMPLES = ("x", "input", "inputs")
_ANSWERS = ("y", "target", "targets", "label", "labels")


def with_ignored_targets(batch: Batch, ignored: int) -> Batch:
    """Replace targets of weight zero by the value that the module's loss excludes from its mean.

    If all weights are zero, targets stay unchanged, because the mean would be NaN.
    """
    if "targets" not in batch:
        return batch
    counts = batch["weights"] > 0
    counts = counts | ~counts.any()
    return {**batch, "targets": torch.where(counts, batch["targets"], ignored)}


@contextmanager
def knowing_target(ignored: int, where: str) -> Iterator[None]:
    """A context for a loss that must accept the target `ignored`.

    Raises:
        UserError: It does not.
    """
    try:
        yield
    except IndexError as error:
        if f"Target {ignored} " not in str(error):
            raise
        raise UserError(
            f"The loss of forward() does not exclude the target {ignored}, which marks what does not count",
            where,
            "Set ignored_target: ClassVar[int] in Config to the ignore_index of the loss.",
        ) from error


def call(network: nn.Module, arguments: Any, batch: Batch, where: str) -> Any:
    """Call a module with the result of `Config.inputs`; if that is None, with arguments from the batch by name."""
    if isinstance(arguments, Mapping):
        return network(**arguments)
    if isinstance(arguments, tuple):
        return network(*arguments)
    if arguments is not None:
        return network(arguments)
    if list(inspect.signature(network.forward).parameters) == ["batch"]:
        return network(batch)
    return network(**by_name(network, batch, where))


def by_name(network: nn.Module, batch: Batch, where: str) -> dict[str, Tensor]:
    """The arguments of a module's forward, taken from the batch by name; x means the sample, y its target.

    Raises:
        UserError: The batch has no array for a required argument.
    """
    beside = ("weights", "keys", "step", "part", "sources", "labels", "targets")
    sample = next(name for name in ("tokens", "images", *batch) if name in batch and name not in beside)
    answer = next((name for name in ("targets", "labels") if name in batch), None)
    found: dict[str, Tensor] = {}
    for name, parameter in inspect.signature(network.forward).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        if name in batch:
            found[name] = batch[name]
        elif parameter.default is parameter.empty and name in _SAMPLES:
            found[name] = batch[sample]
        elif parameter.default is parameter.empty and name in _ANSWERS and answer is not None:
            found[name] = batch[answer]
        elif parameter.default is parameter.empty:
            raise UserError(
                f"forward() takes an argument '{name}', but the batch has {', '.join(batch)}",
                where,
                "Define inputs(self, batch) in Config, which returns the arguments of forward().",
            )
    if not found:
        raise UserError(
            "forward() names no argument that the batch has",
            where,
            "Define inputs(self, batch) in Config, which returns the arguments of forward().",
        )
    return found
