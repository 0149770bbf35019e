"""Maps the tensors of another format to ours, with one table for both directions, and writes
safetensors files tensor by tensor.

The save_file of the safetensors package takes all tensors of a file at once, so a file of 5 GB
would need 5 GB of RAM. The format is a JSON header with the offsets of each tensor, followed by the
tensors' data. The files written here are byte for byte those that save_file writes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gengram_megatron.errors import UserError

WRONG_MODEL_HINT = (
    "the config describes a different model (--print-config writes one from the model's own "
    "settings), or some of the model's files are missing or of another version"
)
"""Why a tensor does not fit; the end of an error message."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""The names that safetensors has for the dtypes of our weights."""


class SafetensorsFile:
    """A new safetensors file with given names, shapes and dtypes, whose tensors are written in any
    order.

    The constructor and `write` raise OSError, for example if the disk is full.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.path = path
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wider dtypes come first, so that each tensor starts at a multiple of its element size.
        for name in sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name)):
            shape, dtype = tensors[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        self._offsets = {name: header[name]["data_offsets"] for name in tensors}
        self._data_start = 8 + len(text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes one of the tensors, which must be contiguous."""
        start, end = self._offsets[name]
        assert tensor.nbytes == end - start, f"{name} does not have the size that the header states"
        with self.path.open("r+b") as file:
            file.seek(self._data_start + start)
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are read. Quantized weights mean nothing without their scales."""


@dataclass(frozen=True)
class Part:
    """A tensor of another format, as a part of one of ours.

    shape: the tensor's shape in the other format.
    index: the part's index into our tensor, in the shape of `Weight.view`; () means all of it.
    transposed: whether our tensor holds the transpose of this matrix.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class Weight:
    """One of our tensors, unsharded, and the foreign tensors that are its parts.

    view: the shape that the parts' indices refer to; None means `shape`.
    """

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    view: tuple[int, ...] | None = None

    def split(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and tensor of each part in the other format.

        The tensors are contiguous: views of ours where those are contiguous, else copies.
        """
        for part in self.parts:
            part_tensor = ours.view(self.view or self.shape)[part.index]
            if part.transposed:
                part_tensor = part_tensor.t()
            yield part.name, part_tensor.reshape(part.shape).contiguous()

    def join(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """Returns our tensor, put together from those of the other format and converted to `dtype`.

        Raises UserError if a part has the wrong shape or is not float32, bfloat16 or float16.
        """
        ours = torch.empty(self.shape, dtype=dtype)
        for part in self.parts:
            foreign = read(part.name)
            if foreign.dtype not in _FLOATS:
                raise UserError(
                    f"{part.name} is {_describe(foreign.shape, foreign.dtype)}: give the weights "
                    "in float32, bfloat16 or float16; other dtypes, such as those of quantized "
                    "models, are not read"
                )
            if tuple(foreign.shape) != part.shape:
                raise UserError(
                    f"{part.name} is {_describe(foreign.shape, foreign.dtype)}, and the config "
                    f"asks for {_describe(part.shape, dtype)}: {WRONG_MODEL_HINT}"
                )
            if not part.index and not part.transposed:  # all of ours: a copy would double the RAM
                return foreign.reshape(self.shape).to(dtype).contiguous()
            target = ours.view(self.view or self.shape)[part.index]
            if part.transposed:
                target = target.t()
            target.copy_(foreign.reshape(target.shape))
            del foreign  # or it would stay in RAM while the next part is read
        return ours


def same_tensor(key: str, name: str, *shape: int) -> Weight:
    """Returns the mapping of a tensor that is the same in both formats, except for its name."""
    return Weight(key, shape, (Part(name, shape),))


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Returns a shape and a dtype as text, such as "32 x 16 in bfloat16"."""
    size = " x ".join(map(str, shape)) or str(math.prod(shape))
    return f"{size} in {str(dtype).removeprefix('torch.')}"
