"""Writes checkpoints that hold only weights, tensor by tensor in one process.

A run that finds one in its folder starts from it instead of from random weights (state.py).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import StorageWriter

from gengram_megatron.engine.checkpoint.stored import (
    COMMON,
    FORMAT_NOTE,
    StoredTensors,
    read_common,
)
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import CheckpointStore, Facts, read_facts

FILE_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""megatron-core's description of a checkpoint's format."""

KEPT_KEYS = ("config", "step")
"""Keys of the common state that are kept; the rest belongs to the optimizer and its schedule."""


@dataclass(frozen=True)
class Source:
    """Weights by name: their shapes and dtypes, and a function that reads one of them."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]


def strip(checkpoint: Path, out: Path) -> Path:
    """Copies a checkpoint's weights to a new checkpoint in the folder `out`. Returns its path."""
    stored, common = StoredTensors(checkpoint), read_common(checkpoint)
    source = Source(
        {name: stored.shape(name) for name in stored.weights},
        {name: stored.dtype(name) for name in stored.weights},
        stored.read,
    )
    kept = {name: common[name] for name in KEPT_KEYS}
    return write(CheckpointStore(out), source, kept, read_facts(checkpoint))


def write(store: CheckpointStore, source: Source, common: dict[str, Any], facts: Facts) -> Path:
    """Writes a checkpoint of weights, with only one of them in RAM at a time. Returns its path."""
    final = store.path(facts.step)
    if final.exists():
        raise UserError(f"{final} already exists; give another folder")
    partial = store.begin(facts.step)
    described = {
        name: torch.empty(shape, dtype=source.dtypes[name], device="meta")
        for name, shape in source.shapes.items()
    }
    writer = FileSystemWriter(partial)
    try:
        _save(described, writer, _OneTensorAtATime(source.read))
        torch.save(common, partial / COMMON)
        (partial / FORMAT_NOTE).write_text(json.dumps(FILE_FORMAT))
        store.finish(partial, facts)
    except (OSError, RuntimeError) as error:
        if cause := _system_error(error):
            raise UserError(f"{final} cannot be written: {cause.strerror or cause}") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _system_error(error: BaseException | None) -> OSError | None:
    """Returns the operating system's error, such as a full disk, that caused an error of torch's
    writer; None if there is none."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _save(
    described: dict[str, Tensor], writer: StorageWriter, planner: "_OneTensorAtATime"
) -> None:
    """Does the steps of dcp.save as if each tensor were on a separate rank: the writer would
    otherwise keep a tensor in RAM until it has read the next one of the same rank. dcp.save itself
    warns in a process without a process group.
    """
    planner.set_up_planner(described, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    local = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan(
        [replace(local, items=[item]) for item in local.items]
    )
    written = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for plan in writer.prepare_global_plan(plans)
    ]
    writer.finish(metadata, written)


class _OneTensorAtATime(DefaultSavePlanner):
    """Reads a tensor only when it is to be written."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._read(index.fqn)
