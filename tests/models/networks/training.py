"""Trains a network of `plugin` on this rank, and in plain torch; run by a pool of ranks."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigtrain.config.plugin import load_plugin
from bigtrain.data.loader import distribute
from bigtrain.engines.contract import MicroBatch
from bigtrain.engines.fsdp.config import FSDPConfig
from bigtrain.models.config import FAMILIES
from bigtrain.models.contract import LossSum
from bigtrain.models.plain.family import example_batch
from bigtrain.models.plain.network import load_extra_state
from bigtrain.optim.optimizers.adamw import AdamWConfig
from bigtrain.parallel.config import LayoutConfig
from bigtrain.parallel.mesh import Ranks
from bigtrain.testing.equivalence import gather

PLUGIN = Path(__file__).with_name("plugin.py")
VOCABULARY, CONTEXT, BATCH, STEPS, SEED, LR, CLIP = 11, 8, 5, 4, 3, 3e-3, 1.0

OWN: dict[str, dict[str, Any]] = {
    "families.lenet": {"image_size": 12, "channels": 1, "kernel": 3, "maps": [3, 4], "hidden": [8], "dropout": 0.3},
    "families.resnet": {"image_size": 8, "channels": 1, "blocks": [1, 1], "width": 4, "stem": "3x3"},
    "families.vae": {"image_size": 8, "width": 16, "latent": 3},
    "families.bert": {"context": CONTEXT, "layers": 1, "width": 8, "heads": 2},
    "families.bert_classifier": {"context": CONTEXT, "layers": 1, "width": 8, "heads": 2, "vocabulary": 7},
    "families.bert_classifier mean": {
        "context": CONTEXT,
        "layers": 1,
        "width": 8,
        "heads": 2,
        "vocabulary": 7,
        "pooling": "mean",
    },
    "families.clip": {
        "context": CONTEXT,
        "image_size": 8,
        "patch": 4,
        "layers": 1,
        "text_layers": 1,
        "width": 8,
        "heads": 2,
        "embedding": 6,
    },
    "families.sam": {
        "image_size": 8,
        "channels": 1,
        "layers": 1,
        "width": 8,
        "heads": 2,
        "decoder_layers": 1,
        "masks": 2,
    },
    "families.dalle": {"context": CONTEXT, "image_size": 8, "layers": 1, "width": 8, "heads": 2, "codes": 5, "maps": 6},
    "families.rnn": {"context": CONTEXT, "width": 12, "dropout": 0.2},
    "families.seq2seq": {"context": CONTEXT, "width": 12},
}
"""bigtrain's own plain networks, and their smallest keys; the plugin has others of these names. What follows a space
distinguishes two sets of keys of one network."""


def families() -> list[str]:
    """The networks of the plugin, without the bases of others, and bigtrain's own."""
    return sorted({one.name for one in load_plugin(str(PLUGIN)).registered} - {"digits", "flat", "text"} | OWN.keys())


def config_of(arch: str, plugin: str = str(PLUGIN)) -> Any:
    """The section `model` of a network."""
    if arch in OWN:
        return importlib.import_module(f"bigtrain.models.{arch.partition(' ')[0]}").Config(**OWN[arch])
    load_plugin(plugin)
    found = FAMILIES[arch]
    return found(**({"context": CONTEXT} if found.data_kind == "tokens" else {}))


def global_batch(config: Any, step: int) -> MicroBatch:
    """The batch of a step; the same in every process."""
    batch = example_batch(config, VOCABULARY, BATCH, 1000 + step)
    return {name: x.numpy() for name, x in batch.items() if name != "step"}


def own_part(batch: MicroBatch, rank: int, ranks: int, micro_size: int | None) -> list[MicroBatch]:
    """A rank's micro-batches of a global batch, with fillers where it does not divide."""
    shape = distribute(BATCH, ranks, micro_size or BATCH)
    slots = shape.slots(rank)
    padded = {}
    for name, values in batch.items():
        blank = np.zeros((shape.per_rank * ranks - BATCH, *values.shape[1:]), values.dtype)
        padded[name] = np.concatenate([values, blank])[slots.start : slots.stop]
    size = shape.micro_batch
    return [{name: x[first : first + size] for name, x in padded.items()} for first in range(0, shape.per_rank, size)]


def engine_of(config: Any, layout: LayoutConfig | None = None, **how: Any) -> Any:
    """A new engine of this rank."""
    return FSDPConfig(**how).build(
        config,
        VOCABULARY,
        AdamWConfig(lr=LR, clip=CLIP, eps=1e-6),
        layout=layout or LayoutConfig(),
        precision="fp32",
        seed=SEED,
        ranks=Ranks.from_environment(),
    )


def train(
    archs: list[str], micro_size: int | None = None, resume_at: int | None = None, how: dict[str, Any] | None = None
) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses of the steps and of an evaluation at the end, and the final state in full, of each network."""
    return {arch: _train(config_of(arch), micro_size, resume_at, how or {}) for arch in archs}


def _train(config: Any, micro_size: int | None, resume_at: int | None, how: dict[str, Any]) -> Any:
    engine = engine_of(config, **how)
    losses = []
    for step in range(STEPS):
        if step == resume_at:
            saved = {name: x.detach().clone() for name, x in engine.state().items()}
            engine = engine_of(config, **how)
            with torch.no_grad():
                for name, x in engine.state().items():
                    x.copy_(saved[name])
            engine.state_loaded()
        part = own_part(global_batch(config, step), engine.data_parallel_rank, engine.data_parallel_size, micro_size)
        numbers = engine.train_step(step, part, LR).read()
        losses.append(numbers.loss / numbers.weight)
    part = own_part(global_batch(config, 99), engine.data_parallel_rank, engine.data_parallel_size, micro_size)
    loss, weight = engine.evaluate(iter([part])).sums
    state = gather({name: x for name, x in engine.state().items() if name.startswith(("model.", "extra."))})
    return [*losses, loss / weight], state


def first_step(arch: str, replicas: int = 1, fault: str = "") -> tuple[float, dict[str, Tensor]]:
    """The loss of a step, the gradient of its sum of losses, and the buffers after it.

    Args:
        replicas: Copies of the model; the ranks of each shard it.
        fault: Something that this rank does wrong; see `_plant`.
    """
    undo = _plant(fault)
    try:
        config = config_of(arch)
        layout = LayoutConfig(dp_replicate=replicas)
        engine = engine_of(config, layout)
        part = own_part(global_batch(config, 0), engine.data_parallel_rank, engine.data_parallel_size, None)
        sums = engine.backward(0, part)
        found = {f"gradient of {n}": p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
        found |= dict(engine.model.named_buffers())
        whole = {name: x.clone() for name, x in gather(found).items()}
        numbers = engine.reduce_and_scale(sums, 0.0).read()
        return numbers.loss / numbers.weight, whole
    finally:
        undo()


def _plant(fault: str) -> Callable[[], None]:
    """Do something wrong until it is undone."""
    from bigtrain.checkpoint import state
    from bigtrain.models.plain import across

    places: dict[str, tuple[Any, str, Any]] = {
        "": (across, "_here", across._here),
        "statistics of one rank": (across.AllRanks, "sum", lambda self, x: x * len(self.rows)),
        "negatives of one rank": (across.AllRanks, "sum", lambda self, x: x),
        "gradient of what is gathered is lost": (across._Sum, "backward", staticmethod(lambda _, gradient: gradient)),
        "buffers are not saved": (state, "_persistent_buffers", lambda model: iter(())),
    }
    place, name, wrong = places[fault]
    right = place.__dict__[name]
    setattr(place, name, wrong)
    return lambda: setattr(place, name, right)


def loss_of_a_loaded_copy(arch: str) -> tuple[float, float]:
    """The loss of an evaluation after two steps, and that of the module that `bigtrain.load` builds from the state."""
    config = config_of(arch)
    engine = engine_of(config)
    for step in range(2):
        engine.train_step(step, own_part(global_batch(config, step), 0, 1, None), LR)
    arrays = global_batch(config, 99)
    loss, weight = engine.evaluate(iter([[arrays]])).sums
    saved = {name: x.detach().clone() for name, x in engine.state().items()}
    torch.manual_seed(1234)
    module = config.build_to_load(VOCABULARY, SEED).eval()
    module.load_state_dict(
        {n.removeprefix("model."): x for n, x in saved.items() if n.startswith("model.")}, strict=False
    )
    load_extra_state(module, {n.removeprefix("extra."): x for n, x in saved.items() if n.startswith("extra.")})
    batch: dict[str, Any] = {name: torch.from_numpy(x) for name, x in arrays.items()}
    with torch.no_grad():
        losses = config.loss(module(config.inputs(batch)), batch)
    return loss / weight, float((losses * batch["weights"]).sum() / batch["weights"].sum())


def train_with_fault(arch: str, fault: str) -> Any:
    """`train` of one network, resumed half-way."""
    undo = _plant(fault)
    try:
        return train([arch], None, STEPS // 2)[arch]
    finally:
        undo()


def reference(arch: str) -> list[float]:
    """The same in plain torch: seed, build, forward, backward, clip, AdamW."""
    config = config_of(arch)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    network = config.build(VOCABULARY)

    def loss_of(step: int) -> Tensor:
        batch: dict[str, Any] = {name: torch.from_numpy(x) for name, x in global_batch(config, step).items()}
        given = config.inputs(batch)
        if given is None:
            names = {"tokens", "user", "item", "x"} & batch.keys()
            output = network(**{name: batch[name] for name in names})
        elif isinstance(given, dict):
            output = network(**given)
        else:
            output = network(*given) if isinstance(given, tuple) else network(given)
        weights = batch["weights"]
        loss = config.loss(output, batch)
        if isinstance(loss, LossSum):
            return loss.loss / loss.weight
        return (loss * weights).sum() / weights.sum() if loss.ndim else loss

    if any(torch.nn.parameter.is_lazy(parameter) for parameter in network.parameters()):
        loss_of(0)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    losses = []
    for step in range(STEPS):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if hasattr(network, "after_step"):
            with torch.no_grad():
                network.after_step()
        losses.append(loss.item())
    network.eval()
    return [*losses, loss_of(99).item()]
