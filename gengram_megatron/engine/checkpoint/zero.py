"""What a checkpoint holds of model and optimizer, with DeepSpeed's ZeRO: the same as with
megatron-core's optimizer, under the same names, so that each goes on from what the other wrote.

ZeRO cuts flat tensors of many weights. Here they are put together weight by weight, and those of
each weight are written by one of the ranks that hold copies of the model, in turn.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.checkpoint.contents import Pieces, shards
from gengram_megatron.engine.checkpoint.restore import (
    MASTERS,
    MOMENT_NAMES,
    MOMENTS,
    load_tensors,
    master_name,
)

TOGETHER = 2**28
"""Elements of tensors that are read at once; more if one weight has more."""


class ZeroContents:
    """Of one rank: what is written to a checkpoint and taken from one."""

    def __init__(self, config: Config, chunks: list, optimizer):
        (chunk,) = chunks
        self.bf16 = config.train.dtype == "bf16"
        self.optimizer = optimizer
        self.weights: dict[nn.Parameter, Pieces] = {}
        for piece, weight, start in chunk.pieces:
            self.weights.setdefault(weight, []).append((piece, start))
        self.deepspeed = importlib.import_module("deepspeed")

    def state(self) -> dict:
        """Weights and optimizer as parts of global tensors. All ranks call it together."""
        parts = []
        for number, (weight, pieces) in enumerate(self.weights.items()):
            copies = _copies(weight)
            own = number % copies.size() == copies.rank()
            for name, tensor in self._tensors(weight):
                if own:
                    parts += shards(name, tensor.cpu().flatten(), 0, pieces)
        return {"parts": dict(enumerate(parts)), "optimizer": {"step": self.optimizer.steps}}

    def _tensors(self, weight: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """What there is of a weight, by what comes before its name."""
        utils = self.deepspeed.utils
        master = utils.safe_get_full_fp32_param(weight)
        yield "", master.to(weight.dtype)
        if self.bf16:
            yield MASTERS[0], master
        for moment, name in MOMENT_NAMES.items():
            yield name, utils.safe_get_full_optimizer_state(weight, moment)

    def load(self, path: Path, stored: set[str], steps: int) -> None:
        """All of it. stored: the names of what the checkpoint holds in parts; steps: that Adam has
        done."""
        self.optimizer.steps = steps
        self._load_weights(path)
        utils, names = self.deepspeed.utils, [master_name(stored), *MOMENT_NAMES.values()]
        for weight, (master, *moments) in self._read(path, names, torch.float32):
            utils.safe_set_full_fp32_param(weight, master)
            for moment, value in zip(MOMENTS, moments):
                utils.safe_set_full_optimizer_state(weight, value, moment)

    def start_from_weights(self, path: Path) -> None:
        """Weights in the place of drawn ones, before the first step."""
        self._load_weights(path)

    def _load_weights(self, path: Path) -> None:
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        for weight, (value,) in self._read(path, [""], dtype):
            with self.deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.data.copy_(value)
            self.deepspeed.utils.safe_set_full_fp32_param(weight, value.float())

    def _read(
        self, path: Path, names: list[str], dtype: torch.dtype
    ) -> Iterator[tuple[nn.Parameter, list[Tensor]]]:
        """The tensors of each weight whose names begin with `names`, some weights at a time."""
        for weights in self._batches(len(names)):
            found = {
                weight: [
                    torch.empty(_shape(weight), dtype=dtype, device=weight.device) for _ in names
                ]
                for weight in weights
            }
            parts = [
                part
                for weight, tensors in found.items()
                for name, tensor in zip(names, tensors)
                for part in shards(name, tensor.view(-1), 0, self.weights[weight])
            ]
            load_tensors(dict(enumerate(parts)), path)
            yield from found.items()

    def _batches(self, tensors: int) -> Iterator[list[nn.Parameter]]:
        """The weights, as many at a time as may be read together, with so many tensors each."""
        batch, elements = [], 0
        for weight in self.weights:
            size = tensors * _shape(weight).numel()
            if batch and elements + size > TOGETHER:
                yield batch
                batch, elements = [], 0
            batch.append(weight)
            elements += size
        yield batch


def _copies(weight: nn.Parameter) -> dist.ProcessGroup:
    """The ranks that hold copies of it."""
    if getattr(weight, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def _shape(weight: nn.Parameter) -> torch.Size:
    """Also of one that ZeRO 3 has emptied."""
    return getattr(weight, "ds_shape", weight.shape)
