"""Properties of a module, observed in passes over tiny batches: separable blocks, random draws, coupled sequences."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bigtrain.models.contract import Batch
from bigtrain.models.plain.across import OneProcess, across, couples
from bigtrain.models.plain.draws import Drawn, Draws, drawing, without_second
from bigtrain.models.plain.module import list_entries

if TYPE_CHECKING:
    from bigtrain.models.plain.network import Network

_LOOKS_AT_VALUES = frozenset((
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "is_nonzero", "equal", "bincount", "_unique",
    "_unique2", "unique_dim", "unique_consecutive", "argwhere",
))  # fmt: skip
"""Operators whose result has a shape that depends on values, or whose result Python code may branch on."""


@dataclass(frozen=True)
class Facts:
    """The properties of a plain module that engines need."""

    blocks: tuple[str, ...] = ()
    """Names of modules that run once per pass and whose parameters no other code reads. They can be gathered and
    recomputed separately."""
    by_data: bool = False
    """Whether the pass reads values of tensors, so that different ranks may run different parts of the module."""
    needs_grad: bool = False
    """Whether forward itself computes gradients, in evaluation too."""
    draws: bool = False
    """Whether the pass draws random values."""
    fixed: frozenset[Drawn] = frozenset()
    """Draws whose shape does not depend on the batch."""
    second: frozenset[Drawn] = frozenset()
    """Draws whose second dimension is the batch, in the form of `draws.without_second`."""
    varying: tuple[Drawn, ...] = ()
    """Draws of a training pass that differ between layouts."""
    own_generator: str | None = None
    """Name of an operator that the module called with its own generator, if any."""
    couples: bool = False
    """Whether the module sums over the ranks during a pass, as BatchNorm does."""
    moving: tuple[str, ...] = ()
    """Buffers that a pass changes."""
    held: frozenset[str] = frozenset()
    """Parameters that code may read from another place than their module, see `held_elsewhere`."""
    scale_matters: bool = False
    """Whether gradients are not proportional to the scale of the loss, as where a hook clips them."""


def unknown(module: nn.Module) -> Facts:
    """The assumptions about a module that fails on example batches: valid for any module, but slower."""
    moving = tuple(name for name, buffer in module.named_buffers() if buffer.layout is torch.strided)
    return Facts(by_data=True, needs_grad=True, draws=True, couples=True, moving=moving)


def observe(make: Callable[[], Network], batches: Mapping[int, Batch]) -> Facts:
    """Observe a training pass and an evaluation pass on each batch.

    Args:
        make: Creates a new module for each pass, because passes may change a module.
        batches: Two or more batches, by their number of sequences.
    """
    sizes = sorted(batches)
    scale_matters = False
    found: dict[tuple[bool, int], tuple[Facts, list[Drawn]]] = {}
    for size in sizes:
        network = make()
        network.facts = unknown(network)
        found[True, size] = _pass(network.train(), batches[size])
        if size == sizes[0]:
            scale_matters = _scale_matters(network, batches[size])
        found[False, size] = _evaluation_pass(make, batches[size])
    facts = joined([found[True, sizes[-1]][0], *(other for other, _ in found.values())])
    fixed: frozenset[Drawn] = frozenset()
    second: frozenset[Drawn] = frozenset()
    for training in (True, False):
        small, large = (frozenset(found[training, size][1]) for size in (sizes[0], sizes[-1]))
        fixed |= small & large
        shorter = [
            frozenset(short for drawn in found[training, size][1] if (short := without_second(drawn, size)) is not None)
            for size in (sizes[0], sizes[-1])
        ]
        second |= shorter[0] & shorter[1]
    last = found[True, sizes[-1]][0]
    varying = tuple(
        drawn for drawn in last.varying if drawn not in fixed and without_second(drawn, sizes[-1]) not in second
    )
    return replace(facts, fixed=fixed, second=second, varying=varying, scale_matters=scale_matters)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(dense(a), dense(b)))


def dense(x: Tensor) -> Tensor:
    """A strided tensor with the values of x, for comparisons."""
    return x if x.layout is torch.strided else x.to_dense()


def joined(found: Sequence[Facts]) -> Facts:
    """Combine the facts of several passes, or of the parts of a model."""
    return Facts(
        blocks=tuple(name for name in found[0].blocks if all(name in other.blocks for other in found)),
        by_data=any(one.by_data for one in found),
        needs_grad=any(one.needs_grad for one in found),
        draws=any(one.draws for one in found),
        fixed=frozenset().union(*(one.fixed for one in found)),
        second=frozenset().union(*(one.second for one in found)),
        varying=tuple(dict.fromkeys(drawn for one in found for drawn in one.varying)),
        own_generator=next((one.own_generator for one in found if one.own_generator), None),
        couples=any(one.couples for one in found),
        moving=tuple(dict.fromkeys(name for one in found for name in one.moving)),
        held=frozenset().union(*(one.held for one in found)),
        scale_matters=any(one.scale_matters for one in found),
    )


def _evaluation_pass(make: Callable[[], Network], batch: Batch) -> tuple[Facts, list[Drawn]]:
    def run() -> tuple[Facts, list[Drawn]]:
        network = make()
        network.facts = unknown(network)
        return _pass(network.eval(), batch)

    with torch.no_grad():
        try:
            return run()
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
    facts, seen = run()
    return replace(facts, needs_grad=True), seen


def _pass(network: Network, batch: Batch) -> tuple[Facts, list[Drawn]]:
    rows = len(batch["keys"])
    watch = _Watch(network, dict(list_entries(network.network)))
    draws = Draws(batch["keys"])
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with across(OneProcess(rows), rows), drawing(draws), watch, watch.calls():
        network(batch)
        coupled = couples()
    facts = Facts(
        blocks=() if watch.by_data or watch.differentiates else watch.apart(),
        by_data=watch.by_data,
        needs_grad=watch.differentiates,
        draws=bool(draws.seen),
        varying=tuple(draws.varying),
        own_generator=draws.own_generator,
        couples=coupled > 0,
        moving=tuple(
            name for name, buffer in network.named_buffers() if name in before and not _same(buffer, before[name])
        ),
    )
    return facts, draws.seen


def _scale_matters(network: Network, batch: Batch) -> bool:
    """Whether gradients of half the loss are not half the gradients."""
    from bigtrain.models.plain.family import seeded

    rows = len(batch["keys"])
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    found: list[list[Tensor]] = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                buffer.copy_(before.get(name, buffer))
        network.zero_grad(set_to_none=True)
        with seeded(0), across(OneProcess(rows), rows), drawing(Draws(batch["keys"])):
            loss = network(batch).loss * scale
            if not loss.requires_grad or loss.is_meta:
                return False
            loss.backward()
        found.append([torch.zeros(()) if one.grad is None else one.grad / scale for one in trained])
    same = (torch.allclose(a, b, rtol=1e-3, atol=1e-8, equal_nan=True) for a, b in zip(*found, strict=True))
    return not all(same)


class _Watch(TorchDispatchMode):
    """Observes which blocks run, how often, and whether other code reads their parameters."""

    def __init__(self, network: nn.Module, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.by_data = False
        self.differentiates = False
        self._blocks = blocks
        self._active: list[str] = []
        self._calls: Counter[str] = Counter()
        self._mixed: set[str] = set()
        """Names of blocks whose parameters other code reads, or whose results FSDP cannot process."""
        self._owner = {
            parameter.untyped_storage()._cdata: name
            for name, block in blocks.items()
            for parameter in block.parameters()
        }

    def apart(self) -> tuple[str, ...]:
        """Names of the blocks that can be gathered and recomputed separately."""
        return tuple(name for name in self._blocks if self._calls[name] == 1 and name not in self._mixed)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name in _LOOKS_AT_VALUES or (name == "index" and _by_mask(args)):
            self.by_data = True
        if torch._C._current_graph_task_id() != -1:
            self.differentiates = True
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                owner = self._owner.get(leaf.untyped_storage()._cdata)
                if owner is not None and owner not in self._active:
                    self._mixed.add(owner)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def calls(self) -> Iterator[None]:
        """A context in which calls of blocks are counted."""
        handles = []
        for name, block in self._blocks.items():
            handles.append(block.register_forward_pre_hook(self._enter(name)))
            handles.append(block.register_forward_hook(self._leave(name), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def enter(*_: Any) -> None:
            self._calls[name] += 1
            self._active.append(name)

        return enter

    def _leave(self, name: str) -> Any:
        def leave(block: nn.Module, _: Any, result: Any) -> None:
            self._active.remove(name)
            kept = [value for part in block.modules() for value in tree_leaves(attributes(part))]
            if any(isinstance(value, Tensor) and value.grad_fn is not None for value in kept):
                self._mixed.add(name)  # such as an auxiliary loss, kept as an attribute of the block
            if any(not isinstance(leaf, (Tensor, int, float, str, type(None))) for leaf in tree_leaves(result)):
                self._mixed.add(name)

        return leave


def attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, without parameters, buffers, submodules and hooks."""
    own = {*nn.Module().__dict__, "_compute_dtype", "_flat_weights", "_flat_weight_refs"}
    return {name: value for name, value in vars(module).items() if name not in own and name != "forward"}


def held_elsewhere(network: nn.Module) -> frozenset[str]:
    """Names of parameters that a list, tuple, closure or object holds too, such as an optimizer of the module's own.

    FSDP replaces parameters in their modules alone, so these stay whole on each rank.
    """
    modules = list(network.modules())
    registers: list[Any] = [module._parameters for module in modules]
    registers += [module._flat_weights for module in modules if isinstance(module, nn.RNNBase)]
    entries = Counter(id(one) for register in registers for one in _entries_of(register))
    # Two more references are those of the loop and of the call. Graphs of autograd have some too, which gc ignores.
    suspects = [
        one
        for module in modules
        for one in module._parameters.values()
        if one is not None and sys.getrefcount(one) > entries[id(one)] + 2
    ]
    if not suspects:
        return frozenset()
    gc.collect()
    known = {id(place) for place in (*registers, suspects)}
    places = [place for place in gc.get_referrers(*suspects) if id(place) not in known]
    held = {id(one) for place in places if not isinstance(place, FrameType) for one in gc.get_referents(place)}
    return frozenset(name for name, one in network.named_parameters() if id(one) in held)


def _entries_of(register: Any) -> Any:
    return register if isinstance(register, list) else register.values()


def _by_mask(args: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
