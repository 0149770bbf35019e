"""Reads the tensor chunks that a distributed checkpoint stores, a block at a time.

torch's own reader keeps a whole stored chunk in RAM beside the tensor that it copies it to. This
takes twice the size of a tensor stored in one chunk, and the size of all experts to read one expert.
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
"""Number of bytes read at a time."""


class BlockReader(dcp.FileSystemReader):
    """torch's reader of a checkpoint's folder, with only one block of a stored chunk in RAM."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan asks for into the planner's tensors. Raises EOFError if a file is too
        short, and RuntimeError or pickle.UnpicklingError if torch.save did not write it."""
        for item in plan.items:
            location = self.storage_data[item.storage_index]
            with (Path(self.path) / location.relative_path).open("rb") as file:
                record = self._slice_file(file, location)
                chunk = torch.load(record, map_location="meta", weights_only=True).detach()
                stored = narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)
                target = planner.resolve_tensor(item).detach()
                record.seek(0)
                data_offset = torch.PyTorchFileReader(record).get_record_offset("data/0")
                file.seek(location.offset + data_offset)
                _read(file, target, stored, in_blocks=chunk.is_contiguous())
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read(file: IO[bytes], target: Tensor, stored: Tensor, in_blocks: bool) -> None:
    """Fill `target` with the values of `stored`, a meta tensor of the same shape whose storage begins
    at the file's current position.

    in_blocks: whether the rows of `stored` follow one another. If not, all is read at once.
    """
    start, size = file.tell(), stored.itemsize
    blocks = _blocks(target, stored) if in_blocks else [(target, stored)]
    for target_block, stored_block in blocks:
        if not stored_block.numel():
            continue
        buffer = torch.empty(_span(stored_block), dtype=stored_block.dtype)
        file.seek(start + stored_block.storage_offset() * size)
        if file.readinto(buffer.view(torch.uint8).numpy()) < buffer.nbytes:
            raise EOFError
        target_block.copy_(buffer.as_strided(stored_block.shape, stored_block.stride()))


def _span(tensor: Tensor) -> int:
    """Returns the number of storage elements from a tensor's first element to its last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))


def _blocks(target: Tensor, stored: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields both tensors split along the first axes into parts of at most BLOCK bytes, or into
    single numbers."""
    if not stored.ndim or _span(stored) * stored.itemsize <= BLOCK:
        yield target, stored
        return
    # The stride of an axis of size 1 is arbitrary.
    rows = BLOCK // (stored.stride(0) * stored.itemsize) if len(stored) > 1 else 0
    if rows:
        yield from zip(target.split(rows), stored.split(rows))
        return
    for target_row, stored_row in zip(target, stored):
        yield from _blocks(target_row, stored_row)
