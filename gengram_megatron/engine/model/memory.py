"""The interface between the model and a memory such as Gengram. docs/adding_a_memory.md shows how
to add another one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.distributed import ProcessGroup


class MemoryModule(MegatronModule):
    """The memory of one layer. Its output is added to the hidden state before the layer."""

    def forward(self, hidden: Tensor, inputs: Any) -> Tensor:
        """hidden: [s_local, b, h], this rank's part of the sequence; inputs: what Memory.inputs
        returned for the microbatch. Returns what is added to hidden, in the same shape."""
        raise NotImplementedError

    def finish_gradients(self) -> None:
        """Called after a step's last microbatch, before gradients are summed over the ranks. A
        memory that collects gradients over all microbatches of a step overrides it."""

    def describe(self) -> str:
        """Returns in a few words how the memory is computed; printed when a run starts."""
        return type(self).__name__


@dataclass(frozen=True)
class Memory:
    """The memory of a model.

    layers: the numbers of the layers that have it, counted from 1.
    module: the spec of the MemoryModule of such a layer. The module is built with `config` and
        `pg_collection` in addition to the parameters in the spec.
    inputs: computes the inputs of the memory of all layers from the tokens [b, s] of a microbatch
        of whole sequences. It is called once per microbatch and pipeline stage, even if
        activations are recomputed later; the second argument says whether the model is training.
    metrics: returns what was measured since the last call, for metrics.jsonl; called once per step
        by all ranks, with the data-parallel group.
    """

    layers: tuple[int, ...]
    module: ModuleSpec
    inputs: Callable[[Tensor, bool], Any]
    metrics: Callable[[ProcessGroup], dict[str, float]] = lambda group: {}
