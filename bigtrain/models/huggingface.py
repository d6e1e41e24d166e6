"""Conversion of names and tensor layouts between the state dicts of bigtrain and of Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class HfTensor:
    """Position of a bigtrain parameter in a Hugging Face state dict."""

    name: str
    transposed: bool = False
    """Whether the tensor is stored as (in, out), as in GPT-2's Conv1D."""
    part: tuple[int, int] = (0, 1)
    """(i, n): the parameter is the i-th of n equal parts of the stored tensor along the output dimension."""
    below: tuple[str, ...] = ()
    """Names of further stored tensors of the same shape; the parameter is the concatenation of all along dim 0."""
    padding: tuple[float, ...] = ()
    """Values at the end of a stored vector that the parameter does not have; they are written, but not read."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stored tensors that make up the parameter, in order."""
        return (self.name, *self.below)

    def shape_of(self, *stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the parameter, given the shapes of its stored tensors in the order of `names`."""
        shapes = [shape[::-1] if self.transposed else shape for shape in stored]
        rows = sum(shape[0] for shape in shapes) - len(self.padding)
        return (rows // self.part[1], *shapes[0][1:])

    def index(self, offset: tuple[int, ...], sizes: tuple[int, ...], rows: int) -> tuple[slice, ...]:
        """Slices of the stored tensor that hold a rectangle of the parameter.

        Args:
            offset: Index of the rectangle's first element, in each dimension of the parameter.
            sizes: Shape of the rectangle.
            rows: Number of rows of the full parameter.
        """
        first = offset[0] + self.part[0] * rows
        cut = (
            slice(first, first + sizes[0]),
            *(slice(at, at + n) for at, n in zip(offset[1:], sizes[1:], strict=True)),
        )
        return cut[::-1] if self.transposed else cut


def require(hf: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a config.json has the values that the family supports; a missing key is accepted.

    Raises:
        ValueError: A key has another value.
    """
    for key, value in expected.items():
        found = hf.get(key, value)
        if found not in (value, None):
            raise ValueError(f"its config.json says {key}: {found!r}, but this family supports only {value!r}")


def to_hf(names: Mapping[str, HfTensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a bigtrain state dict to Hugging Face's names and layouts."""
    import torch

    parts: dict[HfTensor, dict[int, Tensor]] = {}
    for name, target in names.items():
        whole = replace(target, part=(0, 1))
        parts.setdefault(whole, {})[target.part[0]] = state[name]
    hf = {}
    for target, pieces in parts.items():
        rows = [pieces[index] for index in sorted(pieces)]
        if target.padding:
            rows.append(rows[0].new_tensor(target.padding))
        tensor = torch.cat(rows)
        for name, part in zip(target.names, tensor.chunk(len(target.names)), strict=True):
            own = part.clone() if target.below else part  # tensors of one file must not share memory
            hf[name] = (own.t() if target.transposed else own).contiguous()
    return hf
