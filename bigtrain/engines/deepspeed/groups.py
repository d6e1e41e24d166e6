"""Tells DeepSpeed which ranks hold copies of the same parameters, and which ranks hold other parts of the model."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh


class ModelParallelUnit:
    """The mesh behind the interface that DeepSpeed expects, which is that of Megatron-LM's `mpu`.

    DeepSpeed averages gradients and shards the model over the data-parallel group only. It sums norms over the
    model-parallel group too.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._tensor: dist.ProcessGroup = mesh["tp"].get_group()
        self._data: dist.ProcessGroup = mesh["dp_shard"].get_group()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group: the ranks that share each matrix."""
        return self._tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return self._tensor.size()

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's index in the tensor-parallel group."""
        return self._tensor.rank()

    # DeepSpeed has another `mpu` for pipelines. Without a pipeline, model parallelism is tensor parallelism alone.
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The data-parallel group: the ranks that hold the same part of the model."""
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self._data)

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return self._data.size()

    def get_data_parallel_rank(self) -> int:
        """This rank's index in the data-parallel group."""
        return self._data.rank()


def count_once_in_norm(parameters: dict[str, nn.Parameter], split: Container[str], copies: Container[str]) -> None:
    """Mark parameters so that DeepSpeed counts each one once in the norm of the gradient.

    Args:
        parameters: This rank's parameters, by qualified name.
        split: Names of parameters that are sharded over the tp axis. Of the others, only tp rank 0 is counted.
        copies: Names of parameters that an earlier pipeline stage counts.
    """
    for name, parameter in parameters.items():
        marked: Any = parameter
        marked.tensor_model_parallel = name in split
        marked.ds_pipe_replicated = name in copies
