"""Counts the FLOPs of a model from its config alone, and estimates how long a run takes: the whole
run at a given utilisation, and a step of a layout in detail.

FLOPs are those of matrix products; a multiplication and an addition count as two. A causal query
attends to half of the sequence on average, so attention counts half of the square. The backward
pass has two products for each one of the forward pass.

Left out are norms, activations, softmax, rotary embeddings, residuals and the optimizer, and the
look-up, window sums, gate and convolution of Gengram. They grow only linearly in the model's
widths, and are bounded by memory bandwidth, not arithmetic. Recomputed activations are left out
too, because utilisation measures the work that the model needs, not work that is done twice.
"""

from dataclasses import dataclass, fields

from gengram_megatron.config import weights
from gengram_megatron.config.schema import Config
from gengram_megatron.plan import communication
from gengram_megatron.plan.stages import ShardedModel

PEAK_BF16_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
}
"""Peak dense bf16 FLOP/s from the vendor's data sheets, by device name. Other variants of the same
chips, such as H100 PCIe, are slower and have other names."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass per token, over all layers."""

    attention_projections: int
    attention_scores: int
    router: int
    feed_forward: int
    gengram: int
    logits: int

    @property
    def total(self) -> int:
        """The FLOPs of all parts together."""
        return sum(vars(self).values())


def forward_flops(config: Config) -> ForwardFlops:
    """Returns the FLOPs of the forward pass per token, by part."""
    model = config.model
    layers, gengram_layers = model.num_layers, len(weights.gengram_layers(model))
    _, topk = weights.experts(model)
    heads_width = model.num_attention_heads * sum(weights.head_widths(model))
    return ForwardFlops(
        attention_projections=layers * 2 * weights.attention_projections(model).total,
        # Two products over seq_length / 2 keys: queries with keys, and attention with values.
        attention_scores=layers * model.seq_length * heads_width,
        router=layers * 2 * weights.router(model).total,
        feed_forward=layers * topk * 2 * weights.feed_forward(model),
        gengram=gengram_layers * 2 * weights.gengram_projection(model).total,
        logits=2 * weights.embedding(model).total,
    )


def training_flops(config: Config) -> int:
    """Returns the FLOPs per token, forward and backward."""
    return 3 * forward_flops(config).total


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, peak_flops: float
) -> float:
    """Returns the model FLOPs utilisation (MFU), from 0 to 1.

    Args:
        tokens_per_second: of all devices together, or of one.
        peak_flops: FLOP/s of the same devices.
    """
    return tokens_per_second * flops_per_token / peak_flops


UTILISATION = 0.4
GPU_TFLOPS = 989.0
"""Dense bf16 TFLOP/s of an H100 SXM, from its data sheet."""
GPUS_PER_NODE = 8
NVLINK_BYTES_PER_SECOND = 450e9
"""Bytes/s that an H100 sends over NVLink, from its data sheet."""
NETWORK_BYTES_PER_SECOND = 50e9
"""Bytes/s per GPU with one 400 Gbit/s network adapter for each."""


@dataclass(frozen=True)
class Speed:
    """The speed of the GPUs."""

    utilisation: float = UTILISATION
    """Share of the peak speed that is reached, from 0 to 1."""
    tflops: float = GPU_TFLOPS

    @property
    def flops(self) -> float:
        """FLOP/s of one GPU."""
        return self.utilisation * self.tflops * 1e12


def seconds_of_run(sharded: ShardedModel, speed: Speed) -> float:
    """Returns the seconds of a run. The utilisation is that of all GPUs over the whole run, so it
    covers everything that keeps them from computing."""
    tokens = sharded.layout.samples * sharded.config.model.seq_length
    return tokens * training_flops(sharded.config) / (sharded.layout.world_size * speed.flops)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, assuming that its parts do not overlap."""

    arithmetic: float
    """Computation of the stage that has most, including recomputation."""
    bubble: float
    """Pipeline bubble: a stage waits for the first and the last microbatches."""
    communication: float

    @property
    def total(self) -> float:
        """The seconds of the whole step."""
        return self.arithmetic + self.bubble + self.communication


def step_time(sharded: ShardedModel, speed: Speed) -> StepTime:
    """Returns the time of a step, to compare layouts. Here the utilisation is that of arithmetic
    alone."""
    layout = sharded.layout
    flops = max(stage_flops(sharded, stage) for stage in range(layout.pipeline))
    arithmetic = flops / speed.flops
    idle = (layout.pipeline - 1) / (layout.virtual_pipeline or 1) / layout.num_microbatches
    return StepTime(arithmetic, arithmetic * idle, _communication_time(sharded))


def stage_flops(sharded: ShardedModel, stage: int) -> float:
    """Returns the FLOPs of one rank of a stage in a step."""
    config, layout = sharded.config, sharded.layout
    forward, layers = forward_flops(config), sharded.layers(stage)
    per_layer = (forward.total - forward.gengram - forward.logits) / config.model.num_layers
    gengram_layers = len(weights.gengram_layers(config.model))
    per_gengram = forward.gengram / gengram_layers if gengram_layers else 0
    inside = len(layers) * per_layer + sum(map(sharded.has_gengram, layers)) * per_gengram
    ends = forward.logits if stage == layout.pipeline - 1 else 0
    passes = {"none": 3, "selective": 3, "full": 4}[config.train.recompute]
    tokens = config.train.global_batch_size * config.model.seq_length
    ranks = layout.tensor * layout.context * layout.data
    return (passes * inside + 3 * ends) * tokens / ranks


def _communication_time(sharded: ShardedModel) -> float:
    """Returns the seconds of communication per step. Ranks are numbered in megatron-core's order:
    tensor, context, data, pipeline; experts are distributed over neighbouring ranks."""
    sent, layout = communication.most_sent(sharded), sharded.layout
    model_ranks = layout.tensor * layout.context
    reach = {
        "tensor": layout.tensor,
        "context": model_ranks,
        "expert": layout.expert_tensor * layout.expert,
        "data": model_ranks * layout.data,
        "pipeline": layout.world_size,
        "memory_rows": model_ranks * layout.data,
    }
    seconds: float = sum(
        getattr(sent, field.name)
        / (
            NVLINK_BYTES_PER_SECOND
            if reach[field.name] <= GPUS_PER_NODE
            else NETWORK_BYTES_PER_SECOND
        )
        for field in fields(sent)
    )
    return seconds
