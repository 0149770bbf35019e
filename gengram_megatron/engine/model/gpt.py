"""The model: megatron-core's GPT with an optional memory in front of chosen layers.

`MemoryModule` and `Memory` are the interface of a memory such as Gengram (docs/adding_a_memory.md
shows how to add another one), `DecoderLayer` adds its output to the hidden state, and `GengramGPT`
computes its inputs from the tokens of whole sequences.

megatron-core's block passes only the arguments that it knows on to the layers. Causal attention
needs no bias, so the inputs of the memory, such as Gengram's k-mers, are passed as the argument
attention_bias. The block captures that argument in a closure with and without recomputation alike,
so each microbatch keeps its own inputs, even with several microbatches in flight in a pipeline
(megatron-core 0.16.1).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from gengram_megatron.engine.model.initialize import InitDistribution, init_tag, whole_weight
from gengram_megatron.engine.model.sequence import select_local_tokens


class MemoryModule(MegatronModule):
    """The memory of one layer. Its output is added to the hidden state before the layer."""

    def forward(self, hidden: Tensor, inputs: Any) -> Tensor:
        """Takes hidden [s_local, b, h], this rank's part of the sequence, and inputs, which
        Memory.inputs returned for the microbatch. Returns what is added to hidden, in the same
        shape."""
        raise NotImplementedError

    def finish_gradients(self) -> None:
        """Does nothing here. A memory that collects gradients over all microbatches of a step
        overrides it. This is called after a step's last microbatch, before gradients are summed
        over the ranks."""

    def describe(self) -> str:
        """Returns in a few words how the memory is computed; a run prints it when it starts."""
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


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight over the last axis with torch's fused kernel.

    megatron-core's own torch norm does not support sequence parallelism. The weight of this one is
    marked so that megatron-core sums its gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = whole_weight((hidden_size,), config, init_tag(InitDistribution(constant=1.0)))

    def forward(self, x: Tensor) -> Tensor:
        """Takes x [..., hidden_size]. Returns the same shape and dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass
class DecoderLayerSubmodules(TransformerLayerSubmodules):
    """The submodules of a layer. memory is IdentityOp for a layer without memory."""

    memory: ModuleSpec | type = IdentityOp


class DecoderLayer(TransformerLayer):
    """Computes x + memory(x, inputs), then attention and the MLP or experts as in megatron-core."""

    def __init__(
        self, config: TransformerConfig, submodules: DecoderLayerSubmodules, **kwargs: Any
    ):
        super().__init__(config=config, submodules=submodules, **kwargs)
        self.has_memory = submodules.memory is not IdentityOp
        if self.has_memory:
            self.memory = build_module(
                submodules.memory, config=config, pg_collection=self.pg_collection
            )

    def forward(
        self, hidden_states: Tensor, *args: Any, attention_bias: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Takes hidden_states [s_local, b, h] and attention_bias, the inputs of the memory, as
        returned by Memory.inputs. Returns the hidden state, and the context of cross-attention,
        here None."""
        if self.has_memory:
            hidden_states = hidden_states + self.memory(hidden_states, attention_bias)
        output: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
        return output


def with_memory(layer: ModuleSpec, memory: ModuleSpec | None) -> ModuleSpec:
    """Turns the spec of megatron-core's layer into the spec of a DecoderLayer with `memory`. With
    None the layer has no memory."""
    submodules = {f.name: getattr(layer.submodules, f.name) for f in fields(layer.submodules)}
    return ModuleSpec(
        module=DecoderLayer,
        params=layer.params,
        submodules=DecoderLayerSubmodules(**submodules, memory=memory or IdentityOp),
    )


class GengramGPT(GPTModel):
    """One pipeline stage of the model, or one chunk of a stage.

    Every stage is given the tokens, so that a memory that reads token ids or looks to the left has
    them on every rank. What the memory computes from them is passed to the layers as
    `attention_bias` (see above).
    """

    def __init__(self, memory: Memory | None, **settings: Any):
        super().__init__(**settings)
        self.model_type = ModelType.encoder_or_decoder  # read by the pipeline schedules
        self.memory = memory

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Takes tokens and labels [b, s], int64: whole sequences, the same on all ranks that share
        them.

        Returns, for the tokens of this context-parallel rank: on the last stage the loss of each
        token [b, s_local], in nats, or without labels the logits [b, s_local, vocabulary]; on the
        other stages the hidden state [s_local, b, h], which under sequence parallelism is also
        split over the tensor-parallel ranks.
        """
        inputs = self.memory and self.memory.inputs(tokens, self.training)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        output: Tensor = super().forward(
            input_ids=select_local_tokens(tokens),
            position_ids=select_local_tokens(positions),
            attention_mask=None,  # the layers know that it is causal
            labels=None if labels is None else select_local_tokens(labels),
            extra_block_kwargs={"attention_bias": inputs},
        )
        return output
