"""Any range of a weight's elements as blocks of the global tensor that the weight is a piece of.

Optimizers that share their work flatten the weights and cut them wherever a rank's share ends. So a
rank holds a range of a weight, which in the tensor is a few blocks: of a matrix the end of a row,
whole rows, and the beginning of a row. Each rank writes and reads its own blocks, and none needs
what another holds.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from gengram_megatron.model.initialize import parts

Pieces = list[tuple[ShardedTensor, int]]
"""What a weight has of global tensors: each piece, and its first element in the weight."""


def pieces_of(chunks: list[nn.Module]) -> dict[nn.Parameter, Pieces]:
    """Of each weight of a rank's model chunks, without the data."""
    found = {}
    for chunk in chunks:
        for piece, weight, start in parts(chunk):
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
