"""Checks that a model keeps the contract `contract.Model`.

Without them, a violation would show up late as wrong results, or never.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.config import UserError, nearest
from bigtrain.models.batches import batch_kind
from bigtrain.models.config import ModelConfig
from bigtrain.models.contract import Batch, Model


def check_model(config: ModelConfig, vocab_size: int, across_layouts: bool = False) -> None:
    """Refuse a model that would not compute what its author intends; see `ModelConfig.check`."""
    config.check(vocab_size, across_layouts)


def check_contract(config: ModelConfig, vocab_size: int) -> None:
    """Build a model on the meta device, which takes no memory, and check it against `contract.Model`.

    Raises:
        UserError: The model violates the contract. The error describes the first violation found.
    """
    if not config.keeps_contract:
        return
    where = config.plugin.place if config.plugin is not None else f"bigtrain/models/families/{config.arch}.py"
    with users_code(config, where, "build()"), torch.device("meta"):
        module = config.build(vocab_size)
    check_module(module, where)
    calls: Counter[str] = Counter()
    for name, block in cast(Model, module).blocks():
        block.register_forward_pre_hook(partial(_count, calls, name))
    # Native families are known to draw no random bits; inspecting each operation would take seconds for large ones.
    watched: AbstractContextManager[Any] = nullcontext() if config.plugin is None else _NoRandomBits(where)
    with users_code(config, where, "forward()"), watched:
        result = module(example_batch(config))
    _check_result(result, where)
    for name, count in calls.items():
        if count > 1:
            raise UserError(
                f"forward() calls the block '{name}' {count} times, but a block is gathered and recomputed once in "
                "each pass",
                where,
                "Remove it from what blocks() returns.",
            )
    count = sum(parameter.numel() for parameter in module.parameters())
    counted = config.parameter_count(vocab_size)
    if count != counted:
        raise UserError(f"parameter_count() returns {counted}, but the model has {count} parameters", where)


def _count(calls: Counter[str], name: str, *_: object) -> None:
    # A call without gradients does not count: FSDP gathers its parameters separately, and nothing is recomputed.
    calls[name] += torch.is_grad_enabled()


@contextmanager
def users_code(config: ModelConfig, where: str, what: str) -> Iterator[None]:
    """Turn an exception raised by a plugin's code into a `UserError` that names the line.

    Exceptions of native families pass unchanged.

    Args:
        where: File of the plugin.
        what: The call that runs inside the context, such as "build()".
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if config.plugin is None:
            raise
        source = Path(where)
        lines = [
            f"{frame.filename}, line {frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if source in (Path(frame.filename), *Path(frame.filename).parents)
        ]
        raise UserError(
            f"{what} fails: {type(error).__name__}: {error}",
            lines[-1] if lines else where,
            "Do not depend on values: the module is built and run here on torch.device('meta'), which has none."
            if "meta" in str(error) and not config.is_plain
            else None,
        ) from error


class _NoRandomBits(TorchDispatchMode):
    """Refuses operations that draw from torch's generator, because their bits would differ between layouts."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Attention raises no false alarm: fused kernels carry the tag even without dropout, but on the meta device
        # attention runs as plain matmuls.
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise UserError(
                f"forward() draws random bits by {function.name()}, which differ between layouts",
                self._where,
                "Use dropout() of bigtrain/models/random.py with the batch's keys.",
            )
        return function(*args, **(kwargs or {}))


def check_module(module: nn.Module, where: str) -> None:
    """Check a built module against `contract.Model`.

    Args:
        where: What errors name as the place of the violation.

    Raises:
        UserError: The module violates the contract. The error describes the first violation found.
    """
    model = cast(Model, module)
    for method in ("blocks", "initialisers"):
        if not callable(getattr(module, method, None)):
            fix = "See 'Adding a model family' in bigtrain/models/README.md."
            raise UserError(f"The module has no {method}()", where, fix)
    if not isinstance(getattr(module, "compute_dtype", None), torch.dtype):
        raise UserError("The module has no compute_dtype", where, "Set self.compute_dtype = torch.float32 in __init__.")
    for name, _ in module.named_buffers():
        raise UserError(
            f"The module has a buffer, '{name}', whose values are lost when it is materialised",
            where,
            "Compute it in forward() from the sizes of the input.",
        )
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
            raise UserError(
                f"'{name}' is {type(part).__name__}, whose random bits differ between layouts",
                where,
                "Use dropout() of bigtrain/models/random.py with the batch's keys.",
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            check_embedding(name, part, where)
    check_names(model.initialisers(), dict(module.named_parameters()), "initialisers()", "parameter", where)
    modules = dict(module.named_modules())
    for name, block in model.blocks():
        if modules.get(name) is not block:
            close = nearest(name, modules)
            raise UserError(
                f"blocks() names a module '{name}', which does not exist",
                where,
                f"Did you mean '{close}'?" if close else "Give the qualified name of named_modules().",
            )


def check_embedding(name: str, part: nn.Embedding | nn.EmbeddingBag, where: str) -> None:
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(part, option):
            raise UserError(
                f"'{name}' is an {type(part).__name__} with {option}, which depends on how the batch is divided",
                where,
                f"Remove {option}.",
            )


def example_batch(config: ModelConfig) -> Batch:
    """A batch of two samples on the meta device, with the names, shapes and dtypes of the loader's batches."""
    arrays = batch_kind(config).example_batch(config, 1, 2, np.random.default_rng(0))
    return {name: torch.from_numpy(values).to("meta") for name, values in arrays.items()}


def _check_result(result: object, where: str) -> None:
    parts = result[:2] if isinstance(result, tuple) and len(result) in (2, 3) else ()
    if not parts or any(
        not isinstance(part, torch.Tensor) or part.shape != () or part.dtype != torch.float32 for part in parts
    ):
        raise UserError(
            "forward() does not return two FP32 scalars, the sum of losses and the sum of weights",
            where,
            "Return LossSum(loss, weight) of bigtrain/models/contract.py.",
        )


def check_names(
    given: Mapping[str, object], real: Mapping[str, nn.Parameter], what: str, kind: str, where: str
) -> None:
    for name in sorted(real.keys() - given.keys()):
        raise UserError(
            f"{what} has no rule for the {kind} '{name}'", where, f'Add one, such as "{name}": Normal(0.02).'
        )
    for name in sorted(given.keys() - real.keys()):
        close = nearest(name, real)
        raise UserError(
            f"{what} has a rule for '{name}', which is not a {kind}", where, close and f"Did you mean '{close}'?"
        )
