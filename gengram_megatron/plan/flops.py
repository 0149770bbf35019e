"""Counts the FLOPs of a model from its config alone.

FLOPs are those of matrix products; a multiplication and an addition count as two. A causal query
attends to half of the sequence on average, so attention counts half of the square. The backward
pass has two products for each one of the forward pass.

Left out are norms, activations, softmax, rotary embeddings, residuals and the optimizer, and the
look-up, window sums, gate and convolution of Gengram. They grow only linearly in the model's widths,
and are bounded by memory bandwidth, not arithmetic. Recomputed activations are left out too, because
utilisation measures the work that the model needs, not work that is done twice.
"""

from dataclasses import dataclass

from gengram_megatron.config import weights
from gengram_megatron.config.schema import Config

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
