"""The model and optimizer state in a checkpoint, for DeepSpeed's ZeRO: the same as for
megatron-core's optimizer, under the same names, so that each can resume from the other's.

ZeRO splits flat tensors that hold many weights. Here they are gathered weight by weight, and the
ranks that hold copies of the model take turns writing them, one rank for each weight.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor, nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.contents import WeightShards, sharded_values
from gengram_megatron.engine.checkpoint.restore import (
    MASTER_PREFIXES,
    MOMENT_PREFIXES,
    MOMENTS,
    load_tensors,
    master_prefix,
)

MAX_ELEMENTS = 2**28
"""Number of tensor elements that are read at once; more if a single weight has more."""


class Chunk(Protocol):
    """What is needed of the engine's model chunk (training/engines/deepspeed.py)."""

    shards: list[tuple[ShardedTensor, nn.Parameter, int]]


class Adam(Protocol):
    """What is needed of the engine's optimizer: the number of steps that it has done."""

    steps: int


class ZeroContents:
    """What one rank writes to a checkpoint and loads from one."""

    def __init__(self, config: Config, chunks: list[Chunk], optimizer: Adam):
        (chunk,) = chunks
        self.bf16 = config.train.dtype == "bf16"
        self.optimizer = optimizer
        self.weights: dict[nn.Parameter, WeightShards] = {}
        for shard, weight, start in chunk.shards:
            self.weights.setdefault(weight, []).append((shard, start))
        self.deepspeed = importlib.import_module("deepspeed")

    def state(self) -> dict[str, Any]:
        """Returns weights and optimizer as sharded tensors. All ranks call this."""
        sharded: list[ShardedTensor] = []
        for number, (weight, shards) in enumerate(self.weights.items()):
            copies = _copies(weight)
            is_writer = number % copies.size() == copies.rank()
            for prefix, tensor in self._tensors(weight):
                if is_writer:
                    sharded += sharded_values(prefix, tensor.cpu().flatten(), 0, shards)
        return {"parts": dict(enumerate(sharded)), "optimizer": {"step": self.optimizer.steps}}

    def _tensors(self, weight: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """Yields the key prefix and the full tensor of a weight and of each of its states."""
        utils = self.deepspeed.utils
        master = utils.safe_get_full_fp32_param(weight)
        yield "", master.to(weight.dtype)
        if self.bf16:
            yield MASTER_PREFIXES[0], master
        for moment, name in MOMENT_PREFIXES.items():
            yield name, utils.safe_get_full_optimizer_state(weight, moment)

    def load(self, path: Path, stored: set[str], steps: int) -> None:
        """Loads weights and optimizer.

        stored: the names of the checkpoint's sharded entries. steps: how many steps Adam has done.
        """
        self.optimizer.steps = steps
        self._load_weights(path)
        utils, prefixes = self.deepspeed.utils, [master_prefix(stored), *MOMENT_PREFIXES.values()]
        for weight, (master, *moments) in self._read(path, prefixes, torch.float32):
            utils.safe_set_full_fp32_param(weight, master)
            for moment, value in zip(MOMENTS, moments):
                utils.safe_set_full_optimizer_state(weight, value, moment)

    def start_from_weights(self, path: Path) -> None:
        """Loads weights in place of the randomly initialized ones, before the first step."""
        self._load_weights(path)

    def _load_weights(self, path: Path) -> None:
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        for weight, (value,) in self._read(path, [""], dtype):
            with self.deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.data.copy_(value)
            self.deepspeed.utils.safe_set_full_fp32_param(weight, value.float())

    def _read(
        self, path: Path, prefixes: list[str], dtype: torch.dtype
    ) -> Iterator[tuple[nn.Parameter, list[Tensor]]]:
        """Yields each weight with its stored tensors, one for each key prefix. Some weights are
        read at a time."""
        for weights in self._batches(len(prefixes)):
            loaded = {
                weight: [
                    torch.empty(_shape(weight), dtype=dtype, device=weight.device) for _ in prefixes
                ]
                for weight in weights
            }
            sharded = [
                shard
                for weight, tensors in loaded.items()
                for prefix, tensor in zip(prefixes, tensors)
                for shard in sharded_values(prefix, tensor.view(-1), 0, self.weights[weight])
            ]
            load_tensors(dict(enumerate(sharded)), path)
            yield from loaded.items()

    def _batches(self, tensors: int) -> Iterator[list[nn.Parameter]]:
        """Yields the weights in groups that may be read together.

        tensors: the number of tensors to read for each weight.
        """
        batch: list[nn.Parameter] = []
        elements = 0
        for weight in self.weights:
            size = tensors * _shape(weight).numel()
            if batch and elements + size > MAX_ELEMENTS:
                yield batch
                batch, elements = [], 0
            batch.append(weight)
            elements += size
        yield batch


def _copies(weight: nn.Parameter) -> dist.ProcessGroup:
    """Returns the group of ranks that hold copies of a weight."""
    group: dist.ProcessGroup = (
        parallel_state.get_data_parallel_group(with_context_parallel=True)
        if getattr(weight, "allreduce", True)
        else parallel_state.get_expert_data_parallel_group()
    )
    return group


def _shape(weight: nn.Parameter) -> torch.Size:
    """Returns the full shape of a weight, even if ZeRO 3 has emptied it."""
    return getattr(weight, "ds_shape", weight.shape)
