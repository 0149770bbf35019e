"""A file of safetensors, written tensor by tensor.

The package's save_file takes all tensors of a file at once, so a file of 5 GB would take as much
memory. The format is a JSON header, which says where each tensor lies, and the numbers behind it.
What is written here is to the byte what save_file writes.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor

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
