"""Restores the state from which a run starts: its newest verified checkpoint, else `init.source`, else the seed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from bigtrain.checkpoint.huggingface import load_hf, read_hf, verify_hf
from bigtrain.checkpoint.loader import Found, find, load_found, read_saved, saved_names, saved_shapes
from bigtrain.checkpoint.ranks import RankGroup as Together
from bigtrain.checkpoint.ranks import world_group
from bigtrain.checkpoint.restore import refuse_unrestored
from bigtrain.config import UserError
from bigtrain.engines.contract import Reloaded
from bigtrain.run import RunConfig, RunDirectory
from bigtrain.training.progress import Progress, from_plain
from bigtrain.training.source import HfSource, is_fresh, resolve_source
from bigtrain.training.vocabulary import fill_rows, resized


class Restoring:
    """Fills the state of a run's engine from checkpoints and sources.

    Args:
        on_event: Writes the event `fallback`, with step and cause, for each newer checkpoint that fails verification.
    """

    def __init__(self, engine: Any, config: RunConfig, directory: RunDirectory, on_event: Callable[..., None]) -> None:
        self.engine, self.config, self.directory = engine, config, directory
        self._event = on_event

    def start(self) -> Progress:
        """Load the newest verified checkpoint; if there is none, load what `init` names, or start from the seed."""
        found = find(self.directory.checkpoints)
        if found is not None:
            for warning in found.warnings:
                self._event("fallback", step=found.step, cause=warning)
            self.directory.check_checkpoint(found.step, found.manifest.identity)
            self._load(found, self.engine.state())
            return from_plain(found.manifest.progress)
        Together(world_group()).once(lambda: refuse_unrestored(self.config))
        init = self.config.init
        if init.source is None:
            return Progress()
        source = resolve_source(init.source, self.directory.path.parent)
        if isinstance(source, HfSource):
            return self._take_weights(source)
        if init.hash not in (None, source.hash):
            raise UserError(
                "init.source is not the checkpoint that this run started from",
                f"{source.run}@{source.step}",
                "Restore it, or choose another --name.",
            )
        found = find(source.checkpoints, source.step)
        assert found is not None  # `find` raises if there is no checkpoint of this step
        return self._take(found)

    def older(self, wanted: int, first: int) -> Progress | None:
        """Load the newest verified checkpoint of at most step `wanted`; if there is none, the newest before `first`.

        Returns:
            The progress of the checkpoint; None if there is no such checkpoint.
        """
        checkpoints = self.directory.checkpoints
        found = find(checkpoints, before=wanted) or find(checkpoints, before=first - 1)
        if found is None:
            return None
        self._load(found, self.engine.state())
        return from_plain(found.manifest.progress)

    def _take(self, found: Found) -> Progress:
        """Load the part of another run's checkpoint that `init.state` selects."""
        state = self.engine.state()
        if self.config.init.state == "weights":
            self._take_weights_of(found, state)
            return Progress()
        # The other run may have used another precision, and have no loss scale.
        saved = saved_names(found)
        state = {name: state[name] for name in state if name in saved or not name.startswith("loss_scale.")}
        self._load(found, state, leave=["loss_scale.*"])
        return from_plain(found.manifest.progress) if self.config.init.state == "all" else Progress()

    def _take_weights_of(self, found: Found, state: dict[str, torch.Tensor]) -> None:
        """Load only the weights of a checkpoint."""
        init, model = self.config.init, self.config.model
        shapes = {name.removeprefix("model."): shape for name, shape in saved_shapes(found).items()}
        own: dict[str, torch.Tensor] = {}
        copies: dict[str, torch.Tensor] = {}
        for name, tensor in self._wanted(state, shapes).items():
            source = model.source_name(name)
            if name in shapes or source == name:
                own[name] = tensor
            else:
                copies[source] = tensor
        # Not every pipeline stage holds the vocabulary's parameters, but the names that may stay unloaded must be
        # equal on all ranks.
        rows = [name for name in shapes if init.new_rows is not None and model.has_vocabulary_rows(name)]
        for weights, leave in ((own, init.fresh), (copies, ("*",))):
            others = resized(model, weights, shapes.get) if init.new_rows is not None else set()
            for name in sorted(others):
                fill_rows(weights.pop(name), read_saved(found, f"model.{name}"), init.new_rows or "mean")
            if weights:
                left = [f"model.{pattern}" for pattern in (*leave, *rows)]
                self._load(found, {f"model.{name}": weights[name] for name in weights}, prefix="model.", leave=left)

    def _take_weights(self, source: HfSource) -> Progress:
        """Load Hugging Face weights, after comparing them with the hash that the launcher recorded."""
        init, model, files = self.config.init, self.config.model, source.files
        if init.hash is not None:
            verify_hf(files, init.hash)
        weights = self._wanted(self.engine.state())
        places = {name: model.source_name(name) for name in weights}
        known = model.hf_names()
        stored = {name: files.shape_of(known[place]) for name, place in places.items() if place in known}
        others = resized(model, weights, stored.get) if init.new_rows is not None else set()
        shapes = {places[name]: tuple(tensor.shape) for name, tensor in weights.items() if name not in others}
        names = files.check_fit(model, shapes)
        for name in sorted(others):
            full = torch.empty(stored[name] or ())
            read_hf(files, {name: known[places[name]]}, {name: full})
            fill_rows(weights.pop(name), full, init.new_rows or "mean")
        load_hf(files, {name: names[places[name]] for name in weights}, weights)
        if isinstance(self.engine, Reloaded):
            self.engine.state_loaded()
        return Progress()

    def _wanted(self, state: dict[str, torch.Tensor], saved: Collection[str] = ()) -> dict[str, torch.Tensor]:
        """The weights that a source must provide, by qualified name.

        Args:
            saved: Names in the source. Adapters that are not among them start from the seed.
        """
        weights = {name.removeprefix("model."): state[name] for name in state if name.startswith("model.")}
        begun = {name for name in weights if self.config.model.is_adapter(name) and name not in saved}
        return {name: weights[name] for name in weights if name not in begun and not is_fresh(name, self.config.init)}

    def _load(self, found: Found, state: dict[str, torch.Tensor], prefix: str = "", leave: Sequence[str] = ()) -> None:
        load_found(found, state, prefix=prefix, leave=leave)
        if isinstance(self.engine, Reloaded):
            self.engine.state_loaded()
