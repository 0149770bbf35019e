"""How the weights of another format lie in ours: one table, read in both directions; and a file of
safetensors, written tensor by tensor.

The package's save_file takes all tensors of a file at once, so a file of 5 GB would take as much
memory. The format is a JSON header, which says where each tensor lies, and the numbers behind it.
What is written here is to the byte what save_file writes.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.errors import UserError

OTHER_MODEL = (
    "the config is of another model (--print-config writes what the model says of itself), or "
    "files of it are missing or of another version"
)
"""Why a tensor does not fit, as the end of a sentence."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""The names that the format has for what weights are stored in."""


class SafetensorsFile:
    """A new file whose tensors are known by name, shape and dtype, and may be written in any order.

    Both ways of writing raise OSError, such as that of a full disk.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]):
        self.path = path
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        # The wider numbers come first, so that each tensor begins at a multiple of their size.
        for name in sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name)):
            shape, dtype = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        self._places = {name: header[name]["data_offsets"] for name in tensors}
        self._start = 8 + len(text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors; it is contiguous."""
        begin, end = self._places[name]
        assert tensor.nbytes == end - begin, f"{name} is not what the header says"
        with self.path.open("r+b") as file:
            file.seek(self._start + begin)
            file.write(tensor.flatten().view(torch.uint8).numpy())


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""dtypes of weights that are read. Those of quantized models mean nothing without their scales."""


@dataclass(frozen=True)
class Part:
    """A tensor of another format, as a part of one of ours.

    index: where it lies in ours, as the owner's `view` shows it; (): all of it.
    shape: of the tensor there.
    turned: a matrix that lies in ours with rows and columns changed.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple = ()
    turned: bool = False


@dataclass(frozen=True)
class Weight:
    """One of our tensors, whole over all ranks, and the parts that it is made of.

    view: the shape in which the parts are cut out.
    """

    key: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    view: tuple[int, ...] | None = None

    def split(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Our tensor as tensors of the other format: contiguous, and views of ours where those are."""
        for part in self.parts:
            found = ours.view(self.view or self.shape)[part.index]
            if part.turned:
                found = found.t()
            yield part.name, found.reshape(part.shape).contiguous()

    def join(self, read: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
        """Our tensor from those of the other format, converted to a dtype of ours.

        UserError: one has another shape, or holds no floating-point numbers.
        """
        ours = torch.empty(self.shape, dtype=dtype)
        for part in self.parts:
            theirs = read(part.name)
            if theirs.dtype not in _FLOATS:
                raise UserError(
                    f"{part.name} is {_describe(theirs.shape, theirs.dtype)}: give the weights in "
                    "float32, bfloat16 or float16; other types, such as those of quantized models, "
                    "are not read"
                )
            if tuple(theirs.shape) != part.shape:
                raise UserError(
                    f"{part.name} is {_describe(theirs.shape, theirs.dtype)}, and the config asks "
                    f"for {_describe(part.shape, dtype)}: {OTHER_MODEL}"
                )
            if not part.index and not part.turned:  # all of ours, which takes no memory twice
                return theirs.reshape(self.shape).to(dtype).contiguous()
            target = ours.view(self.view or self.shape)[part.index]
            if part.turned:
                target = target.t()
            target.copy_(theirs.reshape(target.shape))
            del theirs  # or the next one would be read beside it
        return ours


def whole(key: str, name: str, *shape: int) -> Weight:
    """A tensor that both formats have alike."""
    return Weight(key, shape, (Part(name, shape),))


def _describe(shape, dtype: torch.dtype) -> str:
    size = " x ".join(map(str, shape)) or str(math.prod(shape))
    return f"{size} in {str(dtype).removeprefix('torch.')}"
