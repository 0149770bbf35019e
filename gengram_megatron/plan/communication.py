"""Estimates the bytes that a rank sends in a step, by the process group that it sends them to.

Collectives count as rings: one of n ranks sends (n - 1) / n of the result of an all-gather or of
the input of a reduce-scatter, and twice that for an all-reduce. Left out are single numbers,
gradients of norms, the few rows that convolutions need from neighbouring ranks, and latent
attention's compressed keys. Compared with the collectives of a training step of small models, the
rest is correct to 2 %.
"""

from dataclasses import dataclass, fields

from gengram_megatron.config import weights
from gengram_megatron.config.tables import group_sizes
from gengram_megatron.plan.activations import Activations
from gengram_megatron.plan.memory import GRADIENT
from gengram_megatron.plan.stages import ShardedModel


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes that one rank sends per step."""

    tensor: int
    """Activations inside layers."""
    pipeline: int
    """Activations and their gradients to the next and the previous stage."""
    data: int
    """Gradients and, with a distributed optimizer, updated weights."""
    expert: int
    """Rows to the experts and back."""
    context: int
    """Keys, values and their gradients."""
    memory_rows: int
    """Rows of Gengram tables that are split by rows, and their gradients."""

    @property
    def total(self) -> int:
        """The bytes sent to all groups together."""
        return sum(getattr(self, field.name) for field in fields(self))


def most_sent(sharded: ShardedModel) -> CommunicationVolume:
    """Returns what a rank sends in the pipeline stage that sends most."""
    return max(
        (of_stage(sharded, s) for s in range(sharded.layout.pipeline)), key=lambda s: s.total
    )


def of_stage(sharded: ShardedModel, stage: int) -> CommunicationVolume:
    """Returns what a rank of a pipeline stage sends."""
    microbatch = _Microbatch(sharded)
    times = sharded.layout.num_microbatches
    layers = sharded.layers(stage)
    gengram_layers = sum(map(sharded.has_gengram, layers))
    ends = microbatch.tensor_embedding() if stage == 0 else 0
    ends += microbatch.tensor_logits() if stage == sharded.layout.pipeline - 1 else 0
    inside = len(layers) * microbatch.tensor_layer()
    inside += gengram_layers * microbatch.tensor_gengram()
    return CommunicationVolume(
        tensor=times * (inside + ends),
        pipeline=times * microbatch.pipeline(stage),
        data=_data(sharded, stage),
        expert=times * len(layers) * microbatch.expert(),
        context=times * len(layers) * microbatch.context(),
        memory_rows=times * gengram_layers * microbatch.rows(),
    )


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks


def _data(sharded: ShardedModel, stage: int) -> int:
    parameters = sharded.rank_parameters(stage)
    weight = Activations(sharded).size
    per_weight = GRADIENT + (weight if sharded.config.optimizer.distributed else GRADIENT)
    groups = (
        (parameters.copied, sharded.copies),
        (parameters.experts, sharded.layout.expert_data),
        (parameters.rows, sharded.row_copies()),
    )
    return sum(_ring(count * per_weight, ranks) for count, ranks in groups)


class _Microbatch:
    """Bytes that a rank sends for one microbatch, forward and backward."""

    def __init__(self, sharded: ShardedModel):
        self.sharded, self.layout, self.model = sharded, sharded.layout, sharded.config.model
        activations = Activations(sharded)
        self.tokens, self.size = activations.tokens, activations.size
        recompute = sharded.config.train.recompute
        self.forwards = 2 if recompute == "full" else 1
        self.dense_forwards = 1 if recompute == "none" else 2

    def _region(self, forwards: int) -> int:
        """Returns the bytes of one tensor-parallel region on the hidden state.

        With sequence parallelism there is an all-gather at its start and a reduce-scatter at its
        end, in the backward pass the other way round, and the input is gathered once more for the
        gradient of the weight. Without it there is an all-reduce forward and one backward, each as
        much as an all-gather and a reduce-scatter."""
        passes = 2 * forwards + 2 + self.layout.sequence
        return passes * self._hidden()

    def _hidden(self) -> int:
        """Returns the bytes that a rank sends in an all-gather of the hidden state."""
        return _ring(self.tokens.part * self.model.hidden_size * self.size, self.layout.tensor)

    def tensor_layer(self) -> int:
        attention = self._region(self.forwards)
        if self.sharded.is_dense:
            return attention + self._region(self.dense_forwards)
        rows = self.tokens.routed * self.model.hidden_size * self.size
        return attention + (2 * self.forwards + 2) * _ring(rows, self.layout.expert_tensor)

    def tensor_gengram(self) -> int:
        """Returns the bytes of key and value: reduce-scatter forward, all-gather backward."""
        forward, backward = (1, 1) if self.layout.sequence else (2, 0)
        return (forward * self.forwards + backward) * 2 * self._hidden()

    def tensor_embedding(self) -> int:
        """Returns the bytes of the embedding: reduce-scatter forward, all-gather backward."""
        return 2 * self._hidden()

    def tensor_logits(self) -> int:
        """Returns the bytes of half a region: the loss needs no logits of other ranks."""
        return (3 if self.layout.sequence else 2) * self._hidden()

    def pipeline(self, stage: int) -> int:
        stages, chunks = self.layout.pipeline, self.layout.virtual_pipeline or 1
        if stages == 1:
            return 0
        forward = chunks - (stage == stages - 1)
        backward = chunks - (stage == 0)
        return (forward + backward) * self.tokens.shard * self.model.hidden_size * self.size

    def expert(self) -> int:
        if self.sharded.is_dense:
            return 0
        rows = self.tokens.shard * self.model.moe_router_topk * self.model.hidden_size * self.size
        return (2 * self.forwards + 2) * _ring(rows, self.layout.expert)

    def context(self) -> int:
        heads = weights.key_value_heads(self.model) // self.layout.tensor
        keys = self.tokens.whole * heads * sum(weights.head_widths(self.model)) * self.size
        return (self.forwards + 1) * _ring(keys, self.layout.context)

    def rows(self) -> int:
        """Returns an upper bound for table rows: a different row for every token, or every row of
        the table."""
        sent = 0
        for placement in self.sharded.layout.placements:
            if placement.rows_over is not None:
                ranks = group_sizes(self.sharded.config, self.layout.world_size)[
                    placement.rows_over
                ]
                rows = min(placement.table.rows, self.tokens.part)
                row = placement.table.columns // self.layout.tensor * self.size
                sent += (self.forwards + 1) * _ring(rows * row, ranks)
        return sent
