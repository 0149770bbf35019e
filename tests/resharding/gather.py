"""Everything that a run has learned, as full tensors, however it lies on the ranks.

Where an element belongs is told by the model's description alone (initialize.parts); Adam's states
are taken from the optimizers' own memory. Nothing here goes through a checkpoint's code.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from gengram_megatron.engine.model.initialize import sharded_parameters

STATES = ("exp_avg", "exp_avg_sq")


def full_tensors(chunks: list, optimizer) -> dict[tuple[str, str], Tensor]:
    """By kind (weight, main, exp_avg, exp_avg_sq) and global name, on every rank of the run.

    Copies on several ranks must be equal, and no element may be missing.
    """
    own = [
        (kind, key, shape, positions, values)
        for chunk in chunks
        for key, shape, places, parameter, start in _pieces(chunk.module)
        for kind, positions, values in _values(optimizer, parameter, places, start)
    ]
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    full = {}
    for kind, key, shape, positions, values in (item for rank in gathered for item in rank):
        tensor = full.setdefault((kind, key), torch.full((shape.numel(),), float("nan")))
        there = tensor[positions]
        assert torch.equal(there.nan_to_num(), torch.where(there.isnan(), 0, values)), (kind, key)
        tensor[positions] = values
    assert not [name for name, tensor in full.items() if tensor.isnan().any()]
    return full


def _pieces(module) -> Iterator[tuple]:
    """Of each piece of a global tensor: name, shape, the places of its elements in the flattened
    whole, the parameter that holds it, and its first element there."""
    for part, parameter, start in sharded_parameters(module):
        shape = torch.Size(part.global_shape)
        leading = part.prepend_axis_num  # axes of which the piece has one index, experts say
        first, offsets = part.global_offset[:leading], part.global_offset[leading:]
        block = (*first, *(slice(o, o + n) for o, n in zip(offsets, part.data.shape)))
        places = torch.arange(shape.numel()).view(shape)[block].flatten()
        yield part.key, shape, places, parameter, start


def _values(optimizer, parameter, places: Tensor, start: int) -> Iterator[tuple]:
    """A kind, places in the whole and values: the weight, and the part of Adam's states that this
    rank has. start: the piece's first element in the parameter."""
    size = len(places)
    yield "weight", places, parameter.data.flatten()[start : start + size].float()
    for first, states in _adam(optimizer, parameter):
        begin, end = max(first, start), min(first + len(states["main"]), start + size)
        if begin < end:
            for kind, values in states.items():
                yield kind, places[begin - start : end - start], values[begin - first : end - first]


def _adam(optimizer, parameter) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The first element of the parameter that this rank has states of, and these, flat."""
    for one in optimizer.chained_optimizers:
        if isinstance(one, DistributedOptimizer):
            if parameter in one.model_param_group_index_map:
                found = one._get_main_param_and_optimizer_states(parameter)
                first = one._get_model_param_range_map(parameter)["param"].start
                states = {kind: found[kind].clone() for kind in STATES}
                yield first, {"main": found["param"].detach().clone(), **states}
            continue
        main = getattr(parameter, "main_param", parameter)
        if main in one.optimizer.state:
            states = {kind: one.optimizer.state[main][kind].flatten().clone() for kind in STATES}
            yield 0, {"main": main.detach().flatten().clone(), **states}
