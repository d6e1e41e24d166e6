"""Adapters for the linear layers of a model of transformers; targets have the names that peft uses.

A forward hook adds the adapter's product to a layer's output, so the layer keeps its class and its parameter names.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bigtrain.config import UserError, nearest
from bigtrain.models.adapter import AdapterConfig
from bigtrain.models.init import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHERE = "model.adapter.targets"


def adapted_layers(model: PreTrainedModel, adapter: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that the adapter's `targets` name, by qualified name.

    As in peft, a target is a qualified name, or its end after a dot.

    Raises:
        UserError: A target matches no layer, a layer that is not linear, or a head that is tied to an embedding.
    """
    modules = dict(model.named_modules())
    linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))}
    tables = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    found: dict[str, nn.Module] = {}
    for target in adapter.targets:
        named = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        if not named:
            near = nearest(target, linear)
            fix = f"Did you mean '{near}'?" if near else f"Its linear layers are {', '.join(sorted(linear))}."
            raise UserError(f"The model has no layer '{target}'", WHERE, fix)
        for name, module in named.items():
            if not isinstance(module, (nn.Linear, Conv1D)):
                fix = f"Its linear layers are {', '.join(sorted(linear))}."
                raise UserError(f"{name} is a {type(module).__name__}, but adapters need linear layers", WHERE, fix)
            if id(module.weight) in tables:
                raise UserError(f"{name} shares its matrix with an embedding", WHERE, "Adapt other layers.")
        found |= named
    return found


def adapt(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    """Freeze the parameters of a model, and add the adapter's parameters, which stay zero until `begin` is called.

    Raises:
        UserError: A target is not valid; see `adapted_layers`.
    """
    layers = adapted_layers(model, adapter)
    model.requires_grad_(False)
    for layer in layers.values():
        weight: Any = layer.weight
        outputs, inputs = reversed(weight.shape) if isinstance(layer, Conv1D) else weight.shape
        for own, shape in adapter.shapes((outputs, inputs)).items():
            layer.register_parameter(own, nn.Parameter(torch.zeros(shape, device=weight.device)))
        layer.register_forward_hook(partial(_add, adapter))


def begin(model: nn.Module, adapter: AdapterConfig, seed: int) -> None:
    """Initialise the adapter's parameters; the values do not depend on the layout."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter.is_own(name):
                shape = tuple(parameter.shape)
                rule = adapter.initialiser(name.rpartition(".")[2], shape)
                fill(parameter, (0,) * len(shape), shape, rule, seed, name)


def _add(adapter: AdapterConfig, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + adapter.beside(arguments[0], {own: layer.get_parameter(own) for own in adapter.own})
