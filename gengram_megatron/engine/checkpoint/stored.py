"""The tensors of a distributed checkpoint, read one by one, whole or in part, in one process.

Nothing here builds a model or joins other processes. A checkpoint may come from anyone, so its
files are read without running what they might hold: of pickled data only plain values and the
classes that describe tensors are taken.
"""

import pickle
from collections.abc import Iterable
from enum import Enum, EnumType
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.blocks import BlockReader
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import FACTS, checkpoints_at

METADATA = ".metadata"
COMMON = "common.pt"
FORMAT_NOTE = "metadata.json"
WRITTEN = (METADATA, COMMON, FORMAT_NOTE)
"""What megatron-core writes of a checkpoint besides the files of its tensors, which .metadata names."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run's folder."""
    if found := checkpoints_at(path):
        return found[-1]
    raise UserError(
        f"{path} is neither a checkpoint of gengram nor the folder of a run that has one: "
        "give a folder such as runs/mine or runs/mine/checkpoints/step_00001000"
    )


def read_common(checkpoint: Path) -> dict:
    """What all ranks have in common: config, step, and of a run that can go on its schedule."""
    try:
        return torch.load(checkpoint / COMMON, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint / COMMON} cannot be read: {str(error).splitlines()[0]}"
        ) from None


def read_config(checkpoint: Path) -> Config:
    """The config of the run that wrote a checkpoint."""
    try:
        return Config.model_validate(read_common(checkpoint)["config"])
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{checkpoint} was written with a config whose {key} this version does not know: use "
            "the version of gengram that wrote it"
        ) from None


def missing_files(checkpoint: Path, needed: Iterable[str] = (*WRITTEN, FACTS)) -> list[str]:
    """What a checkpoint lacks that loading it takes, a phrase each; none if all of it is there.

    The files of tensors are those that torch's description of them names: checksums say nothing of
    a file that never was in the folder, such as one that a rank of another node wrote elsewhere.

    needed: the other files that must be there.
    """
    found = [f"{name} is missing" for name in needed if not (checkpoint / name).is_file()]
    if not (checkpoint / METADATA).is_file():
        return found
    try:
        ends = _Reader(checkpoint).ends()
    except (UserError, AttributeError) as error:  # the latter of what is no place in a file
        return [*found, str(error)]
    for name, end in sorted(ends.items()):
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) < end:
            found.append(f"{name} has {size:,} bytes and {METADATA} names {end:,}")
    return found


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
        """In the order in which they were written."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, over all ranks."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored."""
        return self._tensors[name].properties.dtype

    def num_bytes(self, name: str) -> int:
        """Of the whole tensor."""
        return self._tensors[name].size.numel() * self.dtype(name).itemsize

    def read(self, name: str, *index: int) -> Tensor:
        """A whole tensor, or the part of it at an index of its first axes."""
        shape, leading = self.shape(name), len(index)
        part = ChunkStorageMetadata(
            offsets=torch.Size([*index, *[0] * (len(shape) - leading)]),
            sizes=torch.Size([*[1] * leading, *shape[leading:]]),
        )
        tensor = torch.empty(part.sizes, dtype=self.dtype(name))
        planner, metadata = _PartPlanner(part), self._reader.read_metadata()
        try:
            # dcp.load's own steps. It warns in a process that is no part of a group.
            planner.set_up_planner({name: tensor}, metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            plan = planner.finish_plan(planner.create_local_plan())
            self._reader.read_data(plan, planner).wait()
        except Exception as error:  # each way in which a file is damaged has an error of its own
            why = getattr(error, "strerror", None) or "its file is damaged"
            file = f" of {Path(error.filename).name}" if getattr(error, "filename", None) else ""
            raise UserError(
                f"{self.folder}: {name} cannot be read: {why}{file}; copy or download it again"
            ) from None
        return tensor.reshape(shape[leading:])


class _PartPlanner(dcp.DefaultLoadPlanner):
    """Reads one part of one tensor, from whichever stored pieces it lies in."""

    def __init__(self, part: ChunkStorageMetadata):
        super().__init__()
        self._part = part

    def create_local_plan(self) -> LoadPlan:
        (name,) = self.state_dict
        stored = self.metadata.state_dict_metadata[name]
        return LoadPlan(create_read_items_for_chunk_list(name, stored, [self._part]))

    def lookup_tensor(self, index) -> Tensor:
        return self.state_dict[index.fqn]


class _Reader(BlockReader):
    """torch's reader, with the description of the tensors read once and safely."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        path = folder / METADATA
        try:
            with path.open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        except Exception as error:  # damaged pickles have many errors
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(self._metadata, Metadata):
            raise UserError(f"{path} does not describe the tensors of a checkpoint")

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._metadata

    def ends(self) -> dict[str, int]:
        """The files that hold tensors, by name, and how many bytes of each are described."""
        ends: dict[str, int] = {}
        for place in (self._metadata.storage_data or {}).values():
            end = place.offset + place.length
            ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
        return ends


class _MegatronMetadata(Metadata):
    """Stands for megatron-core's MCoreMetadata: torch's, with notes on how it was written."""


class _Ignored:
    """Stands for megatron-core's notes on how a checkpoint was written."""


# Of megatron-core 0.15 and forks of it; later ones have empty classes of these names.
_STAND_INS = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _MegatronMetadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Ignored,
}


def _member(kind: type, name: str) -> Enum:
    """The member of an enumeration, which early Pythons 3.11 (Debian 12's) pickle as a getattr."""
    if isinstance(kind, EnumType) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(
        f"it would run builtins.getattr for {name}, and only descriptions of tensors are read"
    )


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that describe tensors, and no other name: not what their modules import."""

    _DESCRIPTIONS = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
    )
    _OTHERS = (
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        # Where older torch keeps the dtype of a tensor.
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    )

    def find_class(self, module: str, name: str):
        if stand_in := _STAND_INS.get((module, name)):
            return stand_in
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module in self._DESCRIPTIONS and name.isidentifier():
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(
            f"it would run {module}.{name}, and only descriptions of tensors are read"
        )
