"""Estimates the memory in bytes of the rank of a layout that needs most, by kind.

Compared with all tensors of a training step of small models on the CPU (tests/test_plan_memory.py:
dense and mixtures of experts, all kinds of attention and recomputation, tensor, pipeline and data
parallelism), the sum is between 1 % too low and 5 % too high. Activations under context and expert
parallelism are calculated but not measured, and nothing has been measured on a GPU or with
DeepSpeed yet. Left out are what CUDA, NCCL and torch's allocator need, the weights that ZeRO 3
gathers for the layers in use, and what fp8 changes: Transformer Engine keeps copies of weights, of
one or two bytes each, and smaller activations.
"""

from dataclasses import dataclass

from gengram_megatron.config.layout import projected_table_bytes
from gengram_megatron.config.schema import DeepSpeed
from gengram_megatron.plan.activations import BYTES, Activations
from gengram_megatron.plan.stages import RankParameters, ShardedModel

GRADIENT = 4  # bytes per weight, because gradients are accumulated in float32
MOMENTS = {"bf16": 12, "fp32": 8}
"""Bytes per weight of Adam's two moments and, for bf16, of the float32 master weights."""


@dataclass(frozen=True)
class Memory:
    """Bytes of memory on one rank."""

    stage: int
    """The pipeline rank, from 0."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Activations of all microbatches that are in flight at once."""
    logits: int
    buffers: int
    """What one layer's backward pass needs temporarily, or Adam's step if that needs more; k-mer
    ids; tables projected once per step."""

    @property
    def total(self) -> int:
        """The bytes of all kinds together."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.logits
            + self.buffers
        )


def peak_rank(sharded: ShardedModel) -> Memory:
    """Returns the memory of the rank that needs most."""
    return max(
        (of_stage(sharded, s) for s in range(sharded.layout.pipeline)), key=lambda m: m.total
    )


def of_stage(sharded: ShardedModel, stage: int) -> Memory:
    """Returns the memory of a rank of a pipeline stage."""
    parameters, precision = sharded.rank_parameters(stage), sharded.config.train.dtype
    activations = Activations(sharded)
    passes = in_flight(sharded, stage)
    kept = sum(
        activations.kept(layer) for chunk in passes for layer in sharded.stages[stage][chunk]
    )
    last = stage == sharded.layout.pipeline - 1
    kept += activations.last() if last else 0
    logits = activations.logits() if last else 0
    states = _states(sharded, stage)
    # The logits are freed when the first layer's backward pass begins.
    working = max(_working(sharded, stage, activations) - logits, 0)
    # Adam computes the square root of all second moments at once, when no activations are left.
    step = states // MOMENTS[precision] * 4
    # On CPUs, offloading would move data within the same memory.
    offload = sharded.config.train.deepspeed if sharded.on_gpu else DeepSpeed()
    weights = BYTES[precision] * _after_zero(sharded, parameters, 3)
    return Memory(
        stage=stage,
        weights=0 if offload.offload_parameters else weights,
        gradients=GRADIENT * _after_zero(sharded, parameters, 2),
        optimizer=0 if offload.offload_optimizer else states,
        activations=kept,
        logits=logits,
        buffers=max(working + len(passes) * activations.ids(), step - kept - logits)
        + _projected(sharded, stage),
    )


def _after_zero(sharded: ShardedModel, parameters: RankParameters, zero_stage: int) -> int:
    """Returns how many of a rank's parameters it keeps: a shard if the config's ZeRO stage is at
    least `zero_stage`, otherwise all."""
    if sharded.zero_stage >= zero_stage:
        return _shard(sharded, parameters)
    return parameters.total


def _shard(sharded: ShardedModel, parameters: RankParameters) -> int:
    """Returns a rank's share of its parameters if they are sharded equally over all ranks that hold
    the same ones."""
    return (
        -(-parameters.copied // sharded.copies)
        + -(-parameters.experts // sharded.layout.expert_data)
        + -(-parameters.rows // sharded.row_copies())
    )


def _states(sharded: ShardedModel, stage: int) -> int:
    """Returns the bytes of Adam's states on a rank of a stage."""
    parameters, size = sharded.rank_parameters(stage), MOMENTS[sharded.config.train.dtype]
    if not sharded.config.optimizer.distributed:
        return size * parameters.total
    return size * _shard(sharded, parameters)


def _projected(sharded: ShardedModel, stage: int) -> int:
    if sharded.projection is None or sharded.projection.input == "features":
        return 0
    return sum(map(sharded.has_gengram, sharded.layers(stage))) * projected_table_bytes(
        sharded.config
    )


def _working(sharded: ShardedModel, stage: int, activations: Activations) -> int:
    """Returns the bytes that the backward pass of one layer holds temporarily: the recomputed
    activations with full recomputation, gradients of activations, and the gradient of a weight
    before it is accumulated."""
    layers = sharded.layers(stage)
    recomputed = 0
    if sharded.config.train.recompute == "full":
        recomputed = max(activations.of_layer(layer) for layer in layers)
    return recomputed + activations.at_work() + _largest_gradient(sharded) * activations.size


def _largest_gradient(sharded: ShardedModel) -> int:
    """Returns the number of elements of a layer's largest weight: gate and up of its experts."""
    model = sharded.config.model
    width = 2 * model.ffn_hidden_size // sharded.feed_forward_ranks
    return sharded.experts_per_rank * width * model.hidden_size


def in_flight(sharded: ShardedModel, stage: int) -> list[int]:
    """Returns the forward passes whose activations a rank keeps at once in megatron-core's
    schedules, each as the number of its model chunk."""
    layout = sharded.layout
    later_stages = layout.pipeline - stage - 1
    if layout.virtual_pipeline is None:
        return [0] * min(layout.num_microbatches, later_stages + 1)
    virtual = layout.virtual_pipeline
    passes = 2 * later_stages + (virtual - 1) * layout.pipeline + 1
    passes = min(passes, layout.num_microbatches * virtual)
    return [number // layout.pipeline % virtual for number in range(passes)]
