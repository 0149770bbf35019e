"""Reads the tensors of a distributed checkpoint one by one, whole or in part, in one process.

Nothing here builds a model or joins other processes. A checkpoint may come from anyone, so its
files are read without running code that they might contain: only plain values and the classes that
describe tensors are unpickled.

Tensors are read a block at a time: torch's own reader keeps a whole stored chunk in RAM beside the
tensor that it copies it to, which takes twice the size of a tensor stored in one chunk, and the
size of all experts to read one expert.
"""

import pickle
from collections.abc import Iterable, Iterator
from enum import Enum, EnumType
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import FACTS

METADATA = ".metadata"
COMMON = "common.pt"
FORMAT_NOTE = "metadata.json"
MEGATRON_FILES = (METADATA, COMMON, FORMAT_NOTE)
"""The files that megatron-core writes besides the tensor files, which are listed in .metadata."""
OPTIMIZER = "optimizer."
"""Prefix of the names of optimizer tensors; all others are weights."""
BLOCK = 4 * 2**20
"""Number of bytes of a tensor that are read at a time."""


def read_common(checkpoint: Path) -> dict[str, Any]:
    """Returns the state that is the same on all ranks: config, step, and if the run can be resumed,
    the schedule and the unsharded optimizer state."""
    try:
        common: dict[str, Any] = torch.load(checkpoint / COMMON, weights_only=True)
        return common
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint / COMMON} cannot be read: {str(error).splitlines()[0]}"
        ) from None


def read_config(checkpoint: Path) -> Config:
    """Returns the config of the run that wrote a checkpoint."""
    try:
        return Config.model_validate(read_common(checkpoint)["config"])
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{checkpoint} was written with a config whose {key} this version does not know: use "
            "the version of gengram that wrote it"
        ) from None


def missing_files(checkpoint: Path, needed: Iterable[str] = (*MEGATRON_FILES, FACTS)) -> list[str]:
    """Returns a phrase for each file that is missing or too short to load the checkpoint.

    The tensor files to look for are those that torch's metadata lists. Checksums are not enough:
    they do not cover a file that was never in the folder, such as one that a rank on another node
    wrote elsewhere.

    needed: the other files that must exist.
    """
    problems = [f"{name} is missing" for name in needed if not (checkpoint / name).is_file()]
    if not (checkpoint / METADATA).is_file():
        return problems
    try:
        described_bytes = _Reader(checkpoint).described_bytes()
    except (UserError, AttributeError) as error:  # AttributeError: an entry is not a file location
        return [*problems, str(error)]
    for name, expected in sorted(described_bytes.items()):
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) < expected:
            problems.append(f"{name} has {size:,} bytes, but {METADATA} describes {expected:,}")
    return problems


class StoredTensors:
    """The tensors of one checkpoint by name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = _Reader(folder)
        self._tensors = {
            name: entry
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the order in which they were written."""
        return list(self._tensors)

    @property
    def weights(self) -> list[str]:
        """The names of the model's tensors, without those of the optimizer."""
        return [name for name in self._tensors if not name.startswith(OPTIMIZER)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the whole tensor, over all ranks."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype in which the tensor is stored."""
        return self._tensors[name].properties.dtype

    def num_bytes(self, name: str) -> int:
        """Returns the size of the whole tensor in bytes."""
        return self._tensors[name].size.numel() * self.dtype(name).itemsize

    def read(self, name: str, *index: int) -> Tensor:
        """Returns a whole tensor, or its part at an index of its first axes. Raises UserError if it
        cannot be read."""
        shape, leading = self.shape(name), len(index)
        part = ChunkStorageMetadata(
            offsets=torch.Size([*index, *[0] * (len(shape) - leading)]),
            sizes=torch.Size([*[1] * leading, *shape[leading:]]),
        )
        tensor = torch.empty(part.sizes, dtype=self.dtype(name))
        planner, metadata = _PartPlanner(self._tensors[name], part), self._reader.read_metadata()
        try:
            # The steps of dcp.load, which itself warns in a process without a process group.
            planner.set_up_planner({name: tensor}, metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            plan = planner.finish_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()
        except Exception as error:  # damaged files can cause many different errors
            reason = getattr(error, "strerror", None) or "its file is damaged"
            filename = getattr(error, "filename", None)
            file = f" of {Path(filename).name}" if filename else ""
            raise UserError(
                f"{self.folder}: {name} cannot be read: {reason}{file}; copy or download it again"
            ) from None
        return tensor.reshape(shape[leading:])


class _PartPlanner(DefaultLoadPlanner):
    """Reads one part of one tensor from the stored chunks that contain it."""

    def __init__(self, stored: TensorStorageMetadata, part: ChunkStorageMetadata):
        super().__init__()
        self._stored, self._part = stored, part

    def create_local_plan(self) -> LoadPlan:
        (name,) = self.state_dict
        return LoadPlan(create_read_items_for_chunk_list(name, self._stored, [self._part]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor: Tensor = self.state_dict[index.fqn]
        return tensor


class _Reader(FileSystemReader):
    """torch's reader of a checkpoint's folder, which here reads the metadata once, without running
    code from it, and has only one block of a stored chunk in RAM."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        path = folder / METADATA
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except Exception as error:  # damaged pickles can cause many different errors
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} does not describe the tensors of a checkpoint")
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def described_bytes(self) -> dict[str, int]:
        """Returns the tensor files by name, with the number of bytes that the metadata
        describes."""
        sizes: dict[str, int] = {}
        for location in (self._metadata.storage_data or {}).values():
            end = location.offset + location.length
            sizes[location.relative_path] = max(end, sizes.get(location.relative_path, 0))
        return sizes

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies what the plan asks for into the planner's tensors. Raises EOFError if a file is
        too short, and RuntimeError or pickle.UnpicklingError if torch.save did not write it."""
        for item in plan.items:
            location = self.storage_data[item.storage_index]
            with (Path(self.path) / location.relative_path).open("rb") as file:
                record = self._slice_file(file, location)
                chunk = torch.load(record, map_location="meta", weights_only=True).detach()
                stored = narrow_tensor_by_index(chunk, item.storage_offsets, item.lengths)
                target = planner.resolve_tensor(item).detach()
                record.seek(0)
                # torch's type stub lacks the method.
                data_offset = torch.PyTorchFileReader(record).get_record_offset("data/0")  # type: ignore[attr-defined]
                file.seek(location.offset + data_offset)
                _read(file, target, stored, in_blocks=chunk.is_contiguous())
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read(file: BufferedReader, target: Tensor, stored: Tensor, in_blocks: bool) -> None:
    """Fills `target` with the values of `stored`, a meta tensor of the same shape whose storage
    begins at the file's current position.

    in_blocks: whether the rows of `stored` follow one another. If not, all is read at once.
    """
    start, size = file.tell(), stored.itemsize
    blocks = _blocks(target, stored) if in_blocks else [(target, stored)]
    for target_block, stored_block in blocks:
        if not stored_block.numel():
            continue
        buffer = torch.empty(_span(stored_block), dtype=stored_block.dtype)
        file.seek(start + int(stored_block.storage_offset()) * size)
        if file.readinto(buffer.view(torch.uint8).numpy().data) < buffer.nbytes:
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


class _MegatronMetadata(Metadata):
    """Replaces megatron-core's MCoreMetadata: torch's, with notes on how it was written."""


class _Ignored:
    """Replaces megatron-core's notes on how a checkpoint was written."""


# For checkpoints of megatron-core 0.15 and its forks; in later versions these classes are empty.
_STAND_INS = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _MegatronMetadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Ignored,
}


def _member(kind: type, name: str) -> Enum:
    """Returns a member of an enum. Early versions of Python 3.11 (Debian 12's) pickle enum members
    as a call of getattr."""
    if isinstance(kind, EnumType) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(
        f"it would run builtins.getattr for {name}, and only descriptions of tensors are read"
    )


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles only the classes that describe tensors; not even what their modules import."""

    _DESCRIPTION_MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
    )
    _OTHER_CLASSES = (
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        # Older versions of torch store a tensor's dtype in these.
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if stand_in := _STAND_INS.get((module, name)):
            return stand_in
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in self._OTHER_CLASSES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module in self._DESCRIPTION_MODULES and name.isidentifier():
            described = super().find_class(module, name)
            if isinstance(described, type) and described.__module__ == module:
                return described
        raise pickle.UnpicklingError(
            f"it would run {module}.{name}, and only descriptions of tensors are read"
        )
