"""Bytes that a rank sends in a step, by the group that it sends them to.

Collectives count as rings: a rank of n sends (n - 1) / n of the result of an all-gather or of the
input of a reduce-scatter, and twice that for an all-reduce. Left out are single numbers, gradients
of norms, the few rows that convolutions need of their neighbours, and latent attention's compressed
keys. Against the collectives of a training step of small models the rest is right to 2 %.
"""

from dataclasses import dataclass, fields

from gengram_megatron.config import weights
from gengram_megatron.config.tables import group_sizes
from gengram_megatron.plan.activations import Activations
from gengram_megatron.plan.memory import GRADIENT
from gengram_megatron.plan.stages import ShardedModel


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes a step, of one rank."""

    tensor: int
    """Activations inside of layers."""
    pipeline: int
    """Activations and their gradients to the next and the previous stage."""
    data: int
    """Gradients, and with a distributed optimizer updated weights."""
    expert: int
    """Rows to the experts and back."""
    context: int
    """Keys, values and their gradients."""
    memory_rows: int
    """Rows of tables that ranks share by rows, and their gradients."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def most_sent(split: ShardedModel) -> CommunicationVolume:
    """By a rank of the stage that sends most."""
    return max((of_stage(split, s) for s in range(split.layout.pipeline)), key=lambda s: s.total)


def of_stage(split: ShardedModel, stage: int) -> CommunicationVolume:
    """By a rank of a pipeline stage."""
    one = _Microbatch(split)
    times = split.layout.num_microbatches
    layers = split.layers(stage)
    memories = sum(map(split.has_gengram, layers))
    ends = one.tensor_embedding() if stage == 0 else 0
    ends += one.tensor_logits() if stage == split.layout.pipeline - 1 else 0
    inside = len(layers) * one.tensor_layer() + memories * one.tensor_gengram()
    return CommunicationVolume(
        tensor=times * (inside + ends),
        pipeline=times * one.pipeline(stage),
        data=_data(split, stage),
        expert=times * len(layers) * one.expert(),
        context=times * len(layers) * one.context(),
        memory_rows=times * memories * one.rows(),
    )


def _ring(size: int, ranks: int) -> int:
    return size * (ranks - 1) // ranks


def _data(split: ShardedModel, stage: int) -> int:
    held, copies = split.held(stage), split.copies
    weight = Activations(split).size
    a_weight = GRADIENT + (weight if split.config.optimizer.distributed else GRADIENT)
    groups = (
        (held.copied, copies),
        (held.experts, split.layout.expert_data),
        (held.rows, split.row_copies()),
    )
    return sum(_ring(count * a_weight, ranks) for count, ranks in groups)


class _Microbatch:
    """What one microbatch makes a rank send, forward and backward."""

    def __init__(self, split: ShardedModel):
        self.split, self.layout, self.model = split, split.layout, split.config.model
        activations = Activations(split)
        self.tokens, self.size = activations.tokens, activations.size
        recompute = split.config.train.recompute
        self.forwards = 2 if recompute == "full" else 1
        self.dense_forwards = 1 if recompute == "none" else 2

    def _region(self, forwards: int) -> int:
        """A region of tensor-parallel work on the hidden state: gathered at its start and reduced
        and scattered at its end, in the backward pass the other way round. What was gathered is
        gathered once more for the gradient of the weight. Without sequence parallelism there is
        an all-reduce forward and one backward, which is as much as a gather and a scatter."""
        passes = 2 * forwards + 2 + self.layout.sequence
        return passes * self._hidden()

    def _hidden(self) -> int:
        """What a ring sends of the hidden state."""
        return _ring(self.tokens.part * self.model.hidden_size * self.size, self.layout.tensor)

    def tensor_layer(self) -> int:
        attention = self._region(self.forwards)
        if self.split.is_dense:
            return attention + self._region(self.dense_forwards)
        rows = self.tokens.routed * self.model.hidden_size * self.size
        return attention + (2 * self.forwards + 2) * _ring(rows, self.layout.expert_tensor)

    def tensor_gengram(self) -> int:
        """Key and value, scattered forward and gathered backward."""
        forward, backward = (1, 1) if self.layout.sequence else (2, 0)
        return (forward * self.forwards + backward) * 2 * self._hidden()

    def tensor_embedding(self) -> int:
        """Scattered forward, gathered backward."""
        return 2 * self._hidden()

    def tensor_logits(self) -> int:
        """Half of a region: the loss needs no logits of other ranks."""
        return (3 if self.layout.sequence else 2) * self._hidden()

    def pipeline(self, stage: int) -> int:
        stages, chunks = self.layout.pipeline, self.layout.virtual_pipeline or 1
        if stages == 1:
            return 0
        forward = chunks - (stage == stages - 1)
        backward = chunks - (stage == 0)
        return (forward + backward) * self.tokens.shard * self.model.hidden_size * self.size

    def expert(self) -> int:
        if self.split.is_dense:
            return 0
        rows = self.tokens.shard * self.model.moe_router_topk * self.model.hidden_size * self.size
        return (2 * self.forwards + 2) * _ring(rows, self.layout.expert)

    def context(self) -> int:
        heads = weights.key_value_heads(self.model) // self.layout.tensor
        keys = self.tokens.whole * heads * sum(weights.head_widths(self.model)) * self.size
        return (self.forwards + 1) * _ring(keys, self.layout.context)

    def rows(self) -> int:
        """At most: every token another row, or every row of the table."""
        sent = 0
        for place in self.split.tables:
            if place.over is not None:
                ranks = group_sizes(self.split.config, self.layout.world_size)[place.over]
                rows = min(place.table.rows, self.tokens.part)
                row = place.table.columns // self.layout.tensor * self.size
                sent += (self.forwards + 1) * _ring(rows * row, ranks)
        return sent
