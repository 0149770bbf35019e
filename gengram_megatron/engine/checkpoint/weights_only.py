"""Checkpoints that hold weights and nothing else, written tensor by tensor in one process.

A run starts from one in its folder as if its weights had been drawn (state.py).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gengram_megatron.engine.checkpoint.stored import (
    COMMON,
    FORMAT_NOTE,
    StoredTensors,
    read_common,
)
from gengram_megatron.engine.checkpoint.summary import OPTIMIZER
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import CheckpointStore, Facts, read_facts

FILE_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""megatron-core's note on how a checkpoint is to be read."""

KEPT = ("config", "step")
"""Of what ranks have in common; the rest belongs to the optimizer and its schedule."""


@dataclass(frozen=True)
class Source:
    """Weights by name: their shape and dtype, and how one of them is read."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]


def strip(checkpoint: Path, out: Path) -> Path:
    """Copy a checkpoint's weights into a folder `out` of checkpoints; returns the new one."""
    stored, common = StoredTensors(checkpoint), read_common(checkpoint)
    names = [name for name in stored.names if not name.startswith(OPTIMIZER)]
    source = Source(
        {name: stored.shape(name) for name in names},
        {name: stored.dtype(name) for name in names},
        stored.read,
    )
    kept = {name: common[name] for name in KEPT}
    return write(CheckpointStore(out), source, kept, read_facts(checkpoint))


def write(store: CheckpointStore, source: Source, common: dict, facts: Facts) -> Path:
    """Write a checkpoint of weights; one of them at a time is in memory."""
    whole = store.path(facts.step)
    if whole.exists():
        raise UserError(f"{whole} is there already; give another folder")
    partial = store.begin(facts.step)
    described = {
        name: torch.empty(shape, dtype=source.dtypes[name], device="meta")
        for name, shape in source.shapes.items()
    }
    writer = dcp.FileSystemWriter(partial)
    try:
        _save(described, writer, _OneByOne(source.read))
        torch.save(common, partial / COMMON)
        (partial / FORMAT_NOTE).write_text(json.dumps(FILE_FORMAT))
        store.finish(partial, facts)
    except (OSError, RuntimeError) as error:
        if why := _system_error(error):
            raise UserError(f"{whole} cannot be written: {why.strerror or why}") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return whole


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system, such as a full disk, behind one that torch's writer made of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _save(described: dict[str, Tensor], writer: dcp.StorageWriter, planner: "_OneByOne") -> None:
    """dcp.save's own steps, as if a rank had each tensor: the writer keeps what it wrote until it
    has read the next one of the same rank. dcp.save warns in a process that is no part of a group.
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


class _OneByOne(dcp.DefaultSavePlanner):
    """Reads a tensor when its turn to be written comes."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__(flatten_state_dict=False)
        self._read = read

    def lookup_object(self, index) -> Tensor:
        return self._read(index.fqn)
