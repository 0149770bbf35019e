"""The model and optimizer state in a checkpoint, for megatron-core's optimizer.

The distributed optimizer flattens the weights and their Adam states, and cuts them wherever a
data-parallel rank's share ends. So a rank holds a range of a weight's elements. In the tensor, this
range is a few blocks: in a matrix the end of a row, whole rows, and the beginning of a row. Each
rank writes and reads its blocks of global tensors, which are the same in every layout and for the
plain optimizer. No rank needs, or waits for, what another rank holds.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.restore import (
    MASTER_PREFIXES,
    MOMENT_PREFIXES,
    load_tensors,
    master_prefix,
    rename_masters,
    set_adam_steps,
    without_extra_states,
)
from gengram_megatron.engine.model.data_parallel import DataParallel, unwrap
from gengram_megatron.engine.model.initialize import sharded_parameters

WeightShards = list[tuple[ShardedTensor, int]]
"""The shards of global tensors that a weight holds, each with the index of its first element in the
flattened weight."""


def weight_shards(chunks: list[MegatronModule]) -> dict[nn.Parameter, WeightShards]:
    """Returns the shards of each weight of a rank's model chunks, without the data."""
    shards: dict[nn.Parameter, WeightShards] = {}
    for chunk in chunks:
        for shard, weight, start in sharded_parameters(chunk):
            assert shard.data.is_contiguous(), f"{shard.key}: its elements are not one range"
            shards.setdefault(weight, []).append((shard.without_data(), start))
    return shards


def sharded_values(
    prefix: str, values: Tensor, first: int, shards: WeightShards
) -> Iterator[ShardedTensor]:
    """Yields values of a weight as sharded tensors, whose data are views of them.

    prefix: goes before the name of each tensor. values: flat [n], for the weight's elements from
    `first` on. Of the ranks that hold copies of the weight, only one may describe each element.
    """
    for shard, start in shards:
        shape = torch.Size((*[1] * shard.prepend_axis_num, *shard.local_shape))
        low = max(first, start)
        high = min(first + values.numel(), start + shape.numel())
        for offset, size in blocks(shape, low - start, high - start):
            data = values[low - first :][: math.prod(size)].view(size)
            low += data.numel()
            yield replace(
                shard,
                key=prefix + shard.key,
                data=data,
                dtype=data.dtype,
                local_shape=size,
                global_offset=tuple(map(sum, zip(shard.global_offset, offset))),
                axis_fragmentations=None,  # the blocks do not form a regular grid
                prepend_axis_num=0,
                replica_id=(*shard.replica_id[:2], 0),
            )


def blocks(
    shape: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields the elements [low, high) of a flattened tensor of `shape` as blocks (offset, size) of
    the tensor, in the order of the elements. There are at most 2 n - 1 blocks for n axes, and none
    for an empty range."""
    row = math.prod(shape[1:])
    first, last = -(-low // row), high // row  # whole rows
    cuts = [low, first * row, last * row, high] if first <= last else [low, high]
    for start, end in pairwise(cuts):
        index = start // row
        if start < end and start % row == end % row == 0:
            yield (index, *[0] * (len(shape) - 1)), ((end - start) // row, *shape[1:])
        elif start < end:
            for offset, size in blocks(shape[1:], start - index * row, end - index * row):
                yield (index, *offset), (1, *size)


# Tensors are described by the model, not by the layout that wrote them. Layers may differ (only
# some have a memory), so each layer has separate names. The optimizer's tensors have the names and
# shapes of megatron-core's fully_reshardable form, for which megatron-core itself would gather them
# first.
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}
STATE_PREFIXES = {"param": MASTER_PREFIXES[0], **MOMENT_PREFIXES}
"""Key prefix of each state that the distributed optimizer keeps for a weight."""


class MegatronContents:
    """What one rank writes to a checkpoint and loads from one."""

    def __init__(self, config: Config, chunks: list[DataParallel], optimizer: ChainedOptimizer):
        self.config, self.optimizer = config, optimizer
        self.models: list[MegatronModule] = unwrap(chunks)
        self.shards = weight_shards(self.models)

    def state(self) -> dict[str, Any]:
        """Returns weights and optimizer as sharded tensors. Their data are views, and nothing is
        gathered."""
        model = self._model_state()
        if not self.config.optimizer.distributed:
            optimizer = self.optimizer.sharded_state_dict(model, metadata=self._metadata())
            return {**model, "optimizer": optimizer}
        objects = [value for value in nested_values(model) if isinstance(value, ShardedObject)]
        local = [*objects, *self._local_ranges({"weight": "", **STATE_PREFIXES})]
        return {"own": dict(enumerate(local)), "optimizer": self.optimizer.state_dict()}

    def _local_ranges(self, prefixes: dict[str, str]) -> Iterator[ShardedTensor]:
        """Yields the ranges that the distributed optimizer has assigned to this rank. For the
        weights it also writes only these ranges: with overlap_param_gather the other elements are
        gathered in the next forward pass, and are outdated until then.

        prefixes: the key prefix of "weight" and of each optimizer state.
        """
        for optimizer in self.optimizer.chained_optimizers:
            for weight in optimizer.model_param_group_index_map:
                local_range = optimizer._get_model_param_range_map(weight)["param"]
                values = optimizer._get_main_param_and_optimizer_states(weight)
                values["weight"] = weight.view(-1)[local_range.start : local_range.end]
                for state, prefix in prefixes.items():
                    yield from sharded_values(
                        prefix, values[state].detach(), local_range.start, self.shards[weight]
                    )

    def load(self, path: Path, stored: set[str], steps: int) -> None:
        """Loads weights and optimizer.

        stored: the names of the checkpoint's sharded entries. steps: how many steps Adam has done.
        """
        self.make_optimizer_states()
        for optimizer in self.optimizer.chained_optimizers:
            set_adam_steps(optimizer.optimizer, steps)
        self._load_weights(path)
        # Loaded separately from the weights, as a master weight may have the same name. The states
        # of the distributed optimizer are filled in place.
        if self.config.optimizer.distributed:
            local = self._local_ranges({**STATE_PREFIXES, "param": master_prefix(stored)})
            load_tensors(dict(enumerate(local)), path)
        else:
            self._load_plain_optimizer(path, stored)

    def start_from_weights(self, path: Path) -> None:
        """Loads weights in place of the randomly initialized ones, before the first step."""
        self._load_weights(path)
        self.optimizer.reload_model_params()

    def _load_weights(self, path: Path) -> None:
        state = without_extra_states(self._model_state())
        load_tensors(state, path)
        for index, model in enumerate(self.models):
            model.load_state_dict(state[f"model{index}"])

    def _load_plain_optimizer(self, path: Path, stored: set[str]) -> None:
        state = self.optimizer.sharded_state_dict(
            self._model_state(), is_loading=True, metadata=self._metadata()
        )
        rename_masters(state, stored)
        load_tensors(state, path)
        self.optimizer.load_state_dict(state)

    def _metadata(self) -> dict[str, Any]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {**CONTENT_METADATA, "dp_cp_group": group}

    def _model_state(self) -> dict[str, Any]:
        return {
            f"model{index}": model.sharded_state_dict(metadata=self._metadata())
            for index, model in enumerate(self.models)
        }

    def make_optimizer_states(self) -> None:
        """Creates Adam's states, so that they can be loaded: torch's Adam has none before its first
        step. This uses megatron-core's own methods; one of them does a step with zero gradients,
        whose effect is overwritten by the loading."""
        for optimizer in self.optimizer.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                optimizer._init_optimizer_states_with_dummy_values()
            else:
                optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
