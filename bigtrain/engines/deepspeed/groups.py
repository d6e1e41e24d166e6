"""How DeepSpeed learns which ranks hold copies of the same parameters, and which hold other parts of the model."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


class ModelParallelUnit:
    """The mesh under the names that DeepSpeed expects (those of Megatron-LM's `mpu`).

    Gradients are averaged, and the model is spread, over the data-parallel group alone; norms are summed over the
    model-parallel group too.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._tensor: dist.ProcessGroup = mesh["tp"].get_group()
        self._data: dist.ProcessGroup = mesh["dp_shard"].get_group()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share each matrix."""
        return self._tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        """Their number."""
        return self._tensor.size()

    def get_tensor_model_parallel_rank(self) -> int:
        """This one's number among them."""
        return self._tensor.rank()

    # For pipelines DeepSpeed has a unit of its own; without one, tensor parallelism is all of the model parallelism.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same parts of the model."""
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers among all."""
        return dist.get_process_group_ranks(self._data)

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return self._data.size()

    def get_data_parallel_rank(self) -> int:
        """This one's number among them."""
        return self._data.rank()


def count_once_in_norm(parameters: dict[str, nn.Parameter], split: Container[str], copies: Container[str]) -> None:
    """Tell DeepSpeed's norms how parameters lie on the ranks of a model-parallel group.

    Args:
        parameters: This rank's, by qualified names.
        split: Those of which each rank of a tp group has another part; of the others the first rank's count.
        copies: Those that an earlier stage has too.
    """
    for name, parameter in parameters.items():
        marked: Any = parameter
        marked.tensor_model_parallel = name in split
        marked.ds_pipe_replicated = name in copies
