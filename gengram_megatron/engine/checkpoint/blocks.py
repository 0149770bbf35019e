"""The pieces of tensors that a distributed checkpoint stores, read a block at a time.

torch's own reader holds a whole stored piece beside the tensor that it copies it to: twice the
tensor where it was stored in one piece, and all experts where one of them is asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

BLOCK = 4 * 2**20
"""Bytes that are read at a time."""


class BlockReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint's folder; a block of a stored piece is in memory at a time."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan asks for to the planner's tensors. EOFError: a file is too short.
        RuntimeError, pickle.UnpicklingError: torch.save did not write what is there."""
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            with (Path(self.path) / place.relative_path).open("rb") as file:
                stored = self._slice_file(file, place)
                piece = torch.load(stored, map_location="meta", weights_only=True).detach()
                wanted = narrow_tensor_by_index(piece, item.storage_offsets, item.lengths)
                target = planner.resolve_tensor(item).detach()
                stored.seek(0)
                numbers = torch.PyTorchFileReader(stored).get_record_offset("data/0")
                file.seek(place.offset + numbers)
                _read(file, target, wanted, in_blocks=piece.is_contiguous())
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read(file: IO[bytes], target: Tensor, wanted: Tensor, in_blocks: bool) -> None:
    """Fill `target` with the numbers of `wanted`, a tensor on the meta device of the same shape,
    whose storage begins where the file stands.

    in_blocks: the rows of `wanted` lie behind one another. Otherwise all is read at once.
    """
    start, size = file.tell(), wanted.itemsize
    blocks = _blocks(target, wanted) if in_blocks else [(target, wanted)]
    for ours, theirs in blocks:
        if not theirs.numel():
            continue
        buffer = torch.empty(_span(theirs), dtype=theirs.dtype)
        file.seek(start + theirs.storage_offset() * size)
        if file.readinto(buffer.view(torch.uint8).numpy()) < buffer.nbytes:
            raise EOFError
        ours.copy_(buffer.as_strided(theirs.shape, theirs.stride()))


def _span(tensor: Tensor) -> int:
    """The elements of the storage from a tensor's first to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))


def _blocks(target: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both, cut along the first axes into parts of at most BLOCK bytes, or single numbers."""
    if not wanted.ndim or _span(wanted) * wanted.itemsize <= BLOCK:
        yield target, wanted
        return
    # The stride of an axis of one row says nothing.
    rows = BLOCK // (wanted.stride(0) * wanted.itemsize) if len(wanted) > 1 else 0
    if rows:
        yield from zip(target.split(rows), wanted.split(rows))
        return
    for ours, theirs in zip(target, wanted):
        yield from _blocks(ours, theirs)
