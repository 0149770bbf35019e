"""What a model has to know of a memory, whichever it is: docs/adding_a_memory.md adds another one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup


class MemoryModule(MegatronModule):
    """One layer's memory. Its output is added to the hidden state in front of the layer."""

    def forward(self, hidden: Tensor, inputs: Any) -> Tensor:
        """hidden: [s_local, b, h], this rank's part of the sequence; inputs: what Memory.inputs has
        made of the microbatch. Returns what is added to hidden, in the same shape."""
        raise NotImplementedError

    def finish_gradients(self) -> None:
        """Called after a step's last microbatch, before gradients are summed over the ranks: for
        gradients that are collected over all microbatches of a step."""

    def describe(self) -> str:
        """How it is computed, in a few words, for the line that says so when a run starts."""
        return type(self).__name__


@dataclass(frozen=True)
class Memory:
    """The memory of a model.

    layers: numbers of the layers that have it, from 1.
    module: describes the MemoryModule of such a layer, which is built with `config` and
        `pg_collection` on top of the parameters given here.
    inputs: makes of the tokens [b, s] of a microbatch, whole sequences, what the memory of all
        layers gets. It is called once a microbatch and pipeline stage, whatever is recomputed
        later; the second argument says whether the model is being trained.
    metrics: what was measured since the last call, for metrics.jsonl; called once a step by all
        ranks, with the data-parallel group.
    """

    layers: tuple[int, ...]
    module: ModuleSpec
    inputs: Callable[[Tensor, bool], Any]
    metrics: Callable[[ProcessGroup], dict[str, float]] = lambda group: {}
