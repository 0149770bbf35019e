"""Bytes that the fullest rank of a layout needs, by kind.

Against all tensors of a training step of small models on the CPU (tests/test_plan_memory.py: dense
and mixtures of experts, all kinds of attention and recomputation, tensor, pipeline and data
parallelism) the sum is between 1 % too low and 5 % too high. Activations under context and expert
parallelism are worked out and not measured, nothing is measured on a GPU yet, nor with DeepSpeed.
Left out is what CUDA, NCCL and torch's allocator take for themselves, the weights that ZeRO 3
gathers for the layers at work, and what fp8 changes: Transformer Engine keeps copies of weights, one
or two bytes each, and smaller activations.
"""

from dataclasses import dataclass

from gengram_megatron.config.layout import projected_table_bytes
from gengram_megatron.config.schema import DeepSpeed
from gengram_megatron.plan.activations import BYTES, Activations
from gengram_megatron.plan.stages import RankParameters, ShardedModel

GRADIENT = 4  # bytes a weight; they add up in float32
MOMENTS = {"bf16": 12, "fp32": 8}
"""Bytes a weight of Adam's two moments and, of bf16 weights, the float32 ones."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    stage: int
    """Its pipeline rank."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Of all microbatches that are in flight at once."""
    logits: int
    buffers: int
    """What one layer's backward pass works with, or Adam's step if it needs more; ids of k-mers;
    tables projected once a step."""

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.buffers
        )


def peak_rank(split: ShardedModel) -> Memory:
    """Of the rank that needs most."""
    return max((of_stage(split, s) for s in range(split.layout.pipeline)), key=lambda m: m.total)


def of_stage(split: ShardedModel, stage: int) -> Memory:
    """Of a rank of a pipeline stage."""
    held, precision = split.held(stage), split.config.train.dtype
    activations = Activations(split)
    flying = in_flight(split, stage)
    kept = sum(activations.kept(layer) for chunk in flying for layer in split.stages[stage][chunk])
    last = stage == split.layout.pipeline - 1
    kept += activations.last() if last else 0
    logits = activations.logits() if last else 0
    states = _states(split, stage)
    # Logits are gone when the first layer's backward pass begins.
    working = max(_working(split, stage, activations) - logits, 0)
    # Adam takes the square root of all second moments at once, when no activations are left.
    step = states // MOMENTS[precision] * 4
    # On CPUs it is the same memory.
    host = split.config.train.deepspeed if split.on_gpu else DeepSpeed()
    return Memory(
        stage=stage,
        weights=0 if host.offload_parameters else BYTES[precision] * _cut(split, held, 3),
        gradients=GRADIENT * _cut(split, held, 2),
        optimizer=0 if host.offload_optimizer else states,
        activations=kept,
        logits=logits,
        buffers=max(working + len(flying) * activations.ids(), step - kept - logits)
        + _projected(split, stage),
    )


def _cut(split: ShardedModel, held: RankParameters, zero_stage: int) -> int:
    """What is left on a rank of the weights that it holds, where those that hold the same ones
    share them from a stage of ZeRO on."""
    return _shared(split, held) if split.zero_stage >= zero_stage else held.total


def _shared(split: ShardedModel, held: RankParameters) -> int:
    """A rank's part of its weights where all that hold the same ones have as much of them."""
    return (
        -(-held.copied // split.copies)
        + -(-held.experts // split.layout.expert_data)
        + -(-held.rows // split.row_copies())
    )


def _states(split: ShardedModel, stage: int) -> int:
    """Bytes of Adam's states on a rank of a stage."""
    held, size = split.held(stage), MOMENTS[split.config.train.dtype]
    if not split.config.optimizer.distributed:
        return size * held.total
    return size * _shared(split, held)


def _projected(split: ShardedModel, stage: int) -> int:
    if split.projection is None or split.projection.of == "features":
        return 0
    return sum(map(split.has_gengram, split.layers(stage))) * projected_table_bytes(split.config)


def _working(split: ShardedModel, stage: int, activations: Activations) -> int:
    """What the backward pass of one layer holds for a moment: a fully recomputed layer's own
    activations, gradients of activations, and that of a weight before it is added up."""
    layers = split.layers(stage)
    again = 0
    if split.config.train.recompute == "full":
        again = max(activations.of_layer(layer) for layer in layers)
    return again + activations.at_work() + _largest_gradient(split) * activations.size


def _largest_gradient(split: ShardedModel) -> int:
    """Elements of the largest matrix of a layer: gate and up of its experts."""
    model = split.config.model
    width = 2 * model.ffn_hidden_size // split.feed_forward_ranks
    return split.experts_a_rank * width * model.hidden_size


def in_flight(split: ShardedModel, stage: int) -> list[int]:
    """The forward passes of which a rank keeps activations at once, each as the number of its
    model chunk, in megatron-core's schedules."""
    layout = split.layout
    after = layout.pipeline - stage - 1
    if layout.virtual_pipeline is None:
        return [0] * min(layout.num_microbatches, after + 1)
    virtual = layout.virtual_pipeline
    passes = 2 * after + (virtual - 1) * layout.pipeline + 1
    passes = min(passes, layout.num_microbatches * virtual)
    return [number // layout.pipeline % virtual for number in range(passes)]
