"""Base config of plain modules: building, calling, and counting parameters and FLOPs."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from types import MethodType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bigtrain.config import UserError
from bigtrain.models.batches import batch_kind
from bigtrain.models.config import Flops, ModelConfig
from bigtrain.models.contract import Batch, LossSum
from bigtrain.models.init import initialise
from bigtrain.models.plain.facts import Facts, attributes, held_elsewhere, joined, observe, unknown
from bigtrain.models.plain.network import Network, has_rules
from bigtrain.models.sums import by_sequence

logger = logging.getLogger(__name__)


class PlainConfig(ModelConfig):
    """Base class for the config of a plain module; parameters and FLOPs are counted on the built module."""

    is_plain: ClassVar[bool] = True

    gives_way: ClassVar[bool] = True
    """Whether a plugin's family may reuse the name of this one, so that networks added to bigtrain break no plugin."""

    loss_is: ClassVar[Literal["mean", "sum"] | None] = None
    """Meaning of a scalar loss that the module returns: the mean over its batch (over samples, or over tokens whose
    target is not -100), or the sum. None: the module returns no scalar loss."""

    ignored_target: ClassVar[int] = -100
    """With `loss_is = "mean"`: value of a target that the module's loss excludes, its `ignore_index`."""

    def inputs(self, batch: Batch) -> Any:
        """The arguments of `forward`: a tensor, a tuple, or a dict by argument name.

        None, the default: each argument is the batch's array of the same name; x means the sample, y its target.
        """
        return None

    def loss(self, output: Any, batch: Batch) -> Tensor | LossSum:
        """Losses of the shape of `batch["weights"]`, (B,) or (B, C).

        Args:
            output: What `forward` returned.

        Raises:
            UserError: Neither `loss_is` nor this method is defined for the output.
        """
        if self.loss_is is not None:
            return _single_loss(output)
        raise UserError(
            f"forward() returns {_kind(output)}, but Config defines no loss for it",
            self._place,
            'Define loss(self, output, batch) in Config: return F.cross_entropy(output, batch["labels"], '
            'reduction="none"). Where forward() returns the mean loss itself, set loss_is: ClassVar = "mean".',
        )

    def as_loss_sum(self, output: Any, batch: Batch, where: str) -> LossSum:
        """Sums of weighted losses and of weights over the batch.

        Args:
            output: What `forward` returned.
            where: File of the module, for messages.

        Raises:
            UserError: `loss` did not return one loss for each weight.
        """
        loss = self.loss(output, batch)
        if isinstance(loss, LossSum):
            return loss
        weights = batch["weights"]
        if self.loss_is is not None and loss.shape == ():
            weight = weights.sum() if self.loss_is == "sum" else (weights > 0).sum().float()
            return LossSum(loss.float() * (weight if self.loss_is == "mean" else 1.0), weight)
        if loss.shape != weights.shape:
            raise UserError(
                f"loss() returns losses of shape {tuple(loss.shape)}, but the weights have shape "
                f"{tuple(weights.shape)}",
                where,
                'Return one loss for each weight: use reduction="none", then a sum or mean over the dimensions that '
                "are not samples.",
            )
        losses = loss.float() * weights
        return LossSum(losses.sum(), weights.sum(), by_sequence(losses, weights))

    @property
    def _place(self) -> str:
        return self.plugin.place if self.plugin is not None else type(self).__module__

    # Building.

    def build_for_engine(self, vocab_size: int, seed: int) -> nn.Module:
        """The module with its facts, and with the values that its `__init__` sets under `seed`.

        A module with `initialisers()` is on the meta device instead, if its only tensors are parameters.
        """
        network = self.wrapped(vocab_size, seed)
        network.facts = self.observed_facts(vocab_size, seed)
        return network

    def wrapped(self, vocab_size: int, seed: int) -> Network:
        """A new module, wrapped as a `Network`; its facts are not known yet."""
        if self._on_meta.get(vocab_size, True):
            without_values = self._without_values(vocab_size)
            self._on_meta[vocab_size] = (
                without_values is not None
                and has_rules(without_values)
                and not (_holds_values(without_values) or held_elsewhere(without_values))
            )
            if without_values is not None and self._on_meta[vocab_size]:
                return Network(without_values, self, self._place)
        network = self._with_values(vocab_size, seed)
        if has_rules(network.network):
            initialise(network, seed)
        return network

    def _with_values(self, vocab_size: int, seed: int) -> Network:
        with seeded(seed):
            built = self.build(vocab_size)
            network = Network(built, self, self._place)
            _make_lazy_layers(network, self, vocab_size)
        _make_contiguous(built)
        _local_batch_norms(built)
        return network

    def build_to_load(self, vocab_size: int, seed: int) -> nn.Module:
        """See `ModelConfig.build_to_load`: the user's module, with what its `__init__` draws under `seed`."""
        return self._with_values(vocab_size, seed).network

    def check(self, vocab_size: int, across_layouts: bool = False) -> None:
        """Run tiny batches through the module, and refuse it if some layout would change results; see `plain.check`."""
        from bigtrain.models.plain.check import check_plain

        check_plain(self, vocab_size, across_layouts)

    def observed_facts(self, vocab_size: int, seed: int) -> Facts:
        """The facts observed with tiny batches; if the module fails on them, facts that hold for any module."""
        key = vocab_size, seed
        if key not in self._facts:
            try:
                self._facts[key] = self._observed(vocab_size, seed)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - the user's code, on a batch that is none of the data's
                logger.warning("the module does not run on an example batch (%s): it is sharded as one part", error)
                self._facts[key] = unknown(self.wrapped(vocab_size, seed))
            self._facts[key] = replace(self._facts[key], held=held_elsewhere(self.wrapped(vocab_size, seed)))
        return self._facts[key]

    def _observed(self, vocab_size: int, seed: int) -> Facts:
        batches = {rows: example_batch(self, vocab_size, rows) for rows in (2, 3)}
        if self._counted(vocab_size).has_no_values():
            batches = {rows: {name: x.to("meta") for name, x in batch.items()} for rows, batch in batches.items()}
        parts = self.parts or (None,)
        return joined([observe(partial(self.of_part, part, vocab_size, seed), batches) for part in parts])

    def of_part(self, part: str | None, vocab_size: int, seed: int) -> Network:
        """A new module, wrapped as a `Network`, whose passes compute the loss of one part."""
        network = self.wrapped(vocab_size, seed)
        network.part = part
        return network

    @cached_property
    def _facts(self) -> dict[tuple[int, int], Facts]:
        return {}

    @cached_property
    def _on_meta(self) -> dict[int, bool]:
        """Whether the module is built without values, by vocabulary size."""
        return {}

    @cached_property
    def _built(self) -> dict[int, Network]:
        return {}

    def _without_values(self, vocab_size: int) -> nn.Module | None:
        try:
            with seeded(0), torch.device("meta"):
                return self.build(vocab_size)
        except Exception:  # noqa: BLE001 - the user's __init__ looks at values, which is no mistake
            return None

    # Counts.

    def parameter_count(self, vocab_size: int) -> int:
        """Exact number of parameters; a tied weight is counted once."""
        return sum(parameter.numel() for parameter in self._counted(vocab_size).parameters())

    def parameter_shapes(self, vocab_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of parameters and persistent buffers, by qualified name; a tied parameter is listed once."""
        module = self._counted(vocab_size).network
        saved = module.state_dict().keys()
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        return {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in saved}

    def parameter_count_without_embeddings(self, vocab_size: int) -> int:
        """Number of parameters without the tables of `nn.Embedding` modules."""
        module = self._counted(vocab_size)
        tables = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
        return self.parameter_count(vocab_size) - sum(table.numel() for table in tables)

    def flops_per_token(self, vocab_size: int) -> Flops:
        """Three times the matmul FLOPs of a forward pass: the backward pass needs two matmuls for each one.

        Attention is counted as the module computes it, so `causal` equals `full`. The result is `Flops.unknown()` if
        the module's FLOPs cannot be counted.
        """
        network = self.wrapped(vocab_size, 0)
        network.facts = unknown(network)
        batch = example_batch(self, vocab_size, 2)
        if network.has_no_values():
            batch = {name: x.to("meta") for name, x in batch.items()}
        try:
            with _counting() as counter:
                for network.part in self.parts or (None,):
                    network(batch)
        except Exception as error:  # noqa: BLE001 - counting is no reason to end a run
            logger.warning("the module's FLOPs cannot be counted: %s", error)
            return Flops.unknown()
        total = 3 * counter.get_total_flops() // (2 * self.context)
        return Flops(total, total)

    def _counted(self, vocab_size: int) -> Network:
        if vocab_size not in self._built:
            self._built[vocab_size] = self.wrapped(vocab_size, 0)
        return self._built[vocab_size]


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """A context that counts matmul FLOPs. oneDNN is off: it runs a recurrent layer as one operator, without matmuls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # switching oneDNN off warns about TF32
        with FlopCounterMode(display=False) as counter, torch.backends.mkldnn.flags(enabled=False):
            yield counter


def pixels(batch: Batch) -> Tensor:
    """The images of a batch in the form that most networks expect: FP32 (B, channels, height, width), contiguous.

    uint8 values are scaled to [0, 1]; floats, which `data.augment` has already normalized, stay unchanged.
    """
    images = batch["images"].permute(0, 3, 1, 2)
    # Strides are made contiguous too: the permuted strides of a one-channel image count as channels-last, and `view`
    # fails on channels-last results.
    values = images.to(torch.float32, memory_format=torch.contiguous_format)
    return values if images.is_floating_point() else values / 255


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which torch, NumPy and `random` are seeded; their states are restored afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def example_batch(config: ModelConfig, vocab_size: int, rows: int, seed: int = 0) -> Batch:
    """A batch of made-up values, with the names, shapes and dtypes of the loader's batches."""
    arrays = batch_kind(config).example_batch(config, max(1, vocab_size), rows, np.random.default_rng([seed, rows]))
    for name in config.sample_arrays.keys() & arrays.keys():
        if arrays[name].dtype.kind == "f":
            arrays[name] = np.abs(arrays[name]) % 1.0  # valid as a row index of an embedding too
    batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return {**batch, "step": torch.zeros((), dtype=torch.int64)}


def _holds_values(module: nn.Module) -> bool:
    """Whether a module has tensors or arrays other than parameters, whose values the meta device would lose."""
    if any(True for _ in module.buffers()):
        return True
    kept = [value for part in module.modules() for value in attributes(part).values()]
    return any(isinstance(value, (Tensor, np.ndarray)) for value in kept)


def _make_lazy_layers(network: Network, config: PlainConfig, vocab_size: int) -> None:
    """Run a pass so that lazy layers, which infer their sizes from the first input, get their sizes."""
    if not any(nn.parameter.is_lazy(x) for x in (*network.parameters(), *network.buffers())):
        return
    batch = example_batch(config, vocab_size, 2)
    network.facts = Facts()
    network.eval()
    with torch.no_grad():
        for network.part in config.parts or (None,):
            network(batch)
    network.part = next(iter(config.parts), None)
    network.train()


def _make_contiguous(module: nn.Module) -> None:
    """Make parameters contiguous, because FSDP accepts no others, such as channels-last ones; and expanded buffers,
    because loading cannot write to them."""
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    for buffer in module.buffers():
        if buffer.layout is torch.strided and 0 in buffer.stride():
            buffer.data = buffer.data.contiguous()


def _local_batch_norms(module: nn.Module) -> None:
    """Make `nn.SyncBatchNorm` compute as `nn.BatchNorm2d`, whose statistics are those of the global batch anyway."""
    for part in module.modules():
        if isinstance(part, nn.SyncBatchNorm):
            part.__dict__["forward"] = MethodType(nn.modules.batchnorm._BatchNorm.forward, part)


def _single_loss(output: Any) -> Tensor:
    """The scalar loss in a module's output: the tensor itself, `output.loss`, `output["loss"]`, or that of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["loss"]
    if hasattr(output, "loss"):
        return output.loss
    scalars = [one for one in output if isinstance(one, Tensor) and one.ndim == 0]
    return scalars[0] if len(scalars) == 1 else output[0]


def _kind(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
