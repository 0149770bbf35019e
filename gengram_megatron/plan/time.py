"""How long a run takes: all of it at a given utilisation, and a step of a layout in detail."""

from dataclasses import dataclass, fields

from gengram_megatron.config import weights
from gengram_megatron.plan import communication
from gengram_megatron.plan.flops import forward_flops, training_flops
from gengram_megatron.plan.stages import ShardedModel

UTILISATION = 0.4
GPU_TFLOPS = 989.0
"""Dense bf16 TFLOP/s of an H100 SXM, from its data sheet."""
GPUS_A_NODE = 8
INSIDE_A_NODE = 450e9
"""Bytes/s that an H100 sends over NVLink, from its data sheet."""
BETWEEN_NODES = 50e9
"""Bytes/s of one 400 Gbit/s adapter a GPU."""


@dataclass(frozen=True)
class Speed:
    """Of the GPUs."""

    utilisation: float = UTILISATION
    """Share of the peak that arithmetic takes, from 0 to 1."""
    tflops: float = GPU_TFLOPS

    @property
    def flops(self) -> float:
        """FLOP/s of one GPU."""
        return self.utilisation * self.tflops * 1e12


def seconds_of_run(split: ShardedModel, speed: Speed) -> float:
    """At that utilisation of all GPUs over the whole run: it covers everything that keeps them
    from computing."""
    tokens = split.layout.samples * split.config.model.seq_length
    return tokens * training_flops(split.config) / (split.layout.world_size * speed.flops)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, one after the other: nothing is taken to overlap."""

    arithmetic: float
    """Of the stage with most of it, recomputation included."""
    bubble: float
    """In which a stage waits for the first and the last microbatches."""
    communication: float

    @property
    def total(self) -> float:
        return self.arithmetic + self.bubble + self.communication


def step_time(split: ShardedModel, speed: Speed) -> StepTime:
    """Of a layout, to compare it with others; the utilisation is that of arithmetic alone."""
    layout = split.layout
    flops = max(stage_flops(split, stage) for stage in range(layout.pipeline))
    arithmetic = flops / speed.flops
    idle = (layout.pipeline - 1) / (layout.virtual_pipeline or 1) / layout.num_microbatches
    return StepTime(arithmetic, arithmetic * idle, _communication_time(split))


def stage_flops(split: ShardedModel, stage: int) -> float:
    """Of one rank of a stage in a step."""
    config, layout = split.config, split.layout
    forward, layers = forward_flops(config), split.layers(stage)
    per_layer = (forward.total - forward.gengram - forward.logits) / config.model.num_layers
    memories = len(weights.gengram_layers(config.model))
    per_memory = forward.gengram / memories if memories else 0
    inside = len(layers) * per_layer + sum(map(split.has_gengram, layers)) * per_memory
    ends = forward.logits if stage == layout.pipeline - 1 else 0
    passes = {"none": 3, "selective": 3, "full": 4}[config.train.recompute]
    tokens = config.train.global_batch_size * config.model.seq_length
    ranks = layout.tensor * layout.context * layout.data
    return (passes * inside + 3 * ends) * tokens / ranks


def _communication_time(split: ShardedModel) -> float:
    """Seconds a step. Ranks are numbered as megatron-core does: tensor, context, data, pipeline;
    experts are dealt out to neighbours."""
    sent, layout = communication.most_sent(split), split.layout
    model_ranks = layout.tensor * layout.context
    reach = {
        "tensor": layout.tensor,
        "context": model_ranks,
        "expert": layout.expert_tensor * layout.expert,
        "data": model_ranks * layout.data,
        "pipeline": layout.world_size,
        "memory_rows": model_ranks * layout.data,
    }
    return sum(
        getattr(sent, field.name)
        / (INSIDE_A_NODE if reach[field.name] <= GPUS_A_NODE else BETWEEN_NODES)
        for field in fields(sent)
    )
