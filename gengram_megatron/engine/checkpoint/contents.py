"""What a checkpoint holds of model and optimizer, with megatron-core's optimizer.

The distributed optimizer flattens the weights, and Adam's states of them, and cuts them wherever a
data-parallel rank's share ends. So a rank holds a range of a weight, which in the tensor is a few
blocks: of a matrix the end of a row, whole rows, and the beginning of a row. Each rank writes and
reads its own blocks of the same global tensors that another layout or the plain optimizer has; no
rank needs, or waits for, what another one holds.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.restore import (
    MASTERS,
    MOMENT_NAMES,
    load_tensors,
    master_name,
    name_masters,
    set_adam_steps,
    without_extra_states,
)
from gengram_megatron.engine.model.data_parallel import unwrapped
from gengram_megatron.engine.model.initialize import sharded_parameters

Pieces = list[tuple[ShardedTensor, int]]
"""What a weight has of global tensors: each piece, and its first element in the weight."""


def pieces_of(chunks: list[nn.Module]) -> dict[nn.Parameter, Pieces]:
    """Of each weight of a rank's model chunks, without the data."""
    found = {}
    for chunk in chunks:
        for piece, weight, start in sharded_parameters(chunk):
            assert piece.data.is_contiguous(), f"{piece.key}: its elements are not one range"
            found.setdefault(weight, []).append((piece.without_data(), start))
    return found


def shards(name: str, values: Tensor, first: int, pieces: Pieces) -> Iterator[ShardedTensor]:
    """Where values of a weight belong in global tensors, as views of them.

    name: goes before that of each tensor. values: flat, of the weight's elements from `first` on.
    No other rank of those that hold copies of the weight may describe the same elements.
    """
    for piece, start in pieces:
        shape = torch.Size((*[1] * piece.prepend_axis_num, *piece.local_shape))
        low = max(first, start)
        high = min(first + values.numel(), start + shape.numel())
        for offset, size in blocks(shape, low - start, high - start):
            data = values[low - first :][: math.prod(size)].view(size)
            low += data.numel()
            yield replace(
                piece,
                key=name + piece.key,
                data=data,
                dtype=data.dtype,
                local_shape=size,
                global_offset=tuple(map(sum, zip(piece.global_offset, offset))),
                axis_fragmentations=None,  # the blocks are no grid
                prepend_axis_num=0,
                replica_id=(*piece.replica_id[:2], 0),
            )


def blocks(
    shape: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements [low, high) of a flattened tensor of `shape` as blocks of it, offsets and sizes,
    in the order of the elements. At most 2 n - 1 of them for n axes; none for an empty range."""
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


# Tensors are described by the model, not by the layout that wrote them, and layers may differ
# (memory in some), so each layer has names of its own. The optimizer's have the names and shapes
# that megatron-core gives them in this form, in which it would gather them on all ranks first.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}
STATES = {"param": MASTERS[0], **MOMENT_NAMES}
"""Of what the distributed optimizer has of a weight, what comes before the weight's name."""


class MegatronContents:
    """Of one rank: what is written to a checkpoint and taken from one."""

    def __init__(self, config: Config, chunks: list, optimizer):
        self.config, self.chunks, self.optimizer = config, chunks, optimizer
        self.pieces = pieces_of(unwrapped(chunks))

    def state(self) -> dict:
        """Weights and optimizer as parts of global tensors: views, of which nothing is gathered."""
        model = self._model_state()
        if not self.config.optimizer.distributed:
            optimizer = self.optimizer.sharded_state_dict(model, metadata=self._metadata())
            return {**model, "optimizer": optimizer}
        notes = [value for value in nested_values(model) if isinstance(value, ShardedObject)]
        own = [*notes, *self._shards({"weight": "", **STATES})]
        return {"own": dict(enumerate(own)), "optimizer": self.optimizer.state_dict()}

    def _shards(self, names: dict[str, str]) -> Iterator[ShardedTensor]:
        """The ranges that the distributed optimizer has given this rank. Of the weights, too, it
        writes no more: with overlap_param_gather the others are gathered in the next forward pass,
        and are old until then.

        names: what comes before a weight's name, for "weight" and what the optimizer has of it.
        """
        for optimizer in self.optimizer.chained_optimizers:
            for weight in optimizer.model_param_group_index_map:
                own = optimizer._get_model_param_range_map(weight)["param"]
                held = optimizer._get_main_param_and_optimizer_states(weight)
                held["weight"] = weight.view(-1)[own.start : own.end]
                for kind, name in names.items():
                    yield from shards(name, held[kind].detach(), own.start, self.pieces[weight])

    def load(self, path: Path, stored: set[str], steps: int) -> None:
        """All of it. stored: the names of what the checkpoint holds in parts; steps: that Adam has
        done."""
        self.make_optimizer_states()
        for optimizer in self.optimizer.chained_optimizers:
            set_adam_steps(optimizer.optimizer, steps)
        self._load_weights(path)
        # Apart from the weights, of which a master weight may have the name. What the distributed
        # optimizer has is filled in place.
        if self.config.optimizer.distributed:
            own = self._shards({**STATES, "param": master_name(stored)})
            load_tensors(dict(enumerate(own)), path)
        else:
            self._load_plain_optimizer(path, stored)

    def start_from_weights(self, path: Path) -> None:
        """Weights in the place of drawn ones, before the first step."""
        self._load_weights(path)
        self.optimizer.reload_model_params()

    def _load_weights(self, path: Path) -> None:
        state = without_extra_states(self._model_state())
        load_tensors(state, path)
        for index, chunk in enumerate(unwrapped(self.chunks)):
            chunk.load_state_dict(state[f"model{index}"])

    def _load_plain_optimizer(self, path: Path, stored: set[str]) -> None:
        state = self.optimizer.sharded_state_dict(
            self._model_state(), is_loading=True, metadata=self._metadata()
        )
        name_masters(state, stored)
        load_tensors(state, path)
        self.optimizer.load_state_dict(state)

    def _metadata(self) -> dict:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return {**CONTENT, "dp_cp_group": group}

    def _model_state(self) -> dict:
        return {
            f"model{index}": chunk.sharded_state_dict(metadata=self._metadata())
            for index, chunk in enumerate(unwrapped(self.chunks))
        }

    def make_optimizer_states(self) -> None:
        """torch's Adam has no state before its first step, and what is not there is not loaded.
        megatron-core's own ways, of which one is a step with gradients of zero, undone by the
        loading."""
        for optimizer in self.optimizer.chained_optimizers:
            if isinstance(optimizer, DistributedOptimizer):
                optimizer._init_optimizer_states_with_dummy_values()
            else:
                optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
