"""Arithmetic of a model, counted from its config alone.

FLOPs are those of matrix products, a multiplication and an addition counting as two. A causal
query sees half of the sequence on average, so attention counts half of the square. The backward
pass has two products for each one of the forward pass.

Left out: norms, activations, softmax, rotary embeddings, residuals and the optimizer, and of
Gengram the look-up, the window sums, the gate and the convolution. They grow only linearly in the
model's widths, and memory bandwidth bounds them, not arithmetic. Recomputed activations are left
out too: utilisation is about the work that the model needs, not about work done twice.
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
"""Dense bf16 FLOP/s of a device by the name it gives itself, from the vendor's data sheets. Other
variants of the same chips, such as H100 PCIe, are slower and have other names."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass, a token, over all layers."""

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
    """A token's, by part."""
    model = config.model
    layers, memories = model.num_layers, len(weights.gengram_layers(model))
    _, chosen = weights.experts(model)
    heads_width = model.num_attention_heads * sum(weights.head_widths(model))
    return ForwardFlops(
        attention_projections=layers * 2 * weights.attention_projections(model).total,
        # Two products over seq_length / 2 keys: of queries with keys, of weights with values.
        attention_scores=layers * model.seq_length * heads_width,
        router=layers * 2 * weights.router(model).total,
        feed_forward=layers * chosen * 2 * weights.feed_forward(model),
        gengram=memories * 2 * weights.gengram_projection(model).total,
        logits=2 * weights.embedding(model).total,
    )


def training_flops(config: Config) -> int:
    """FLOPs a token, forward and backward."""
    return 3 * forward_flops(config).total


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, peak_flops: float
) -> float:
    """Share of the devices' peak that the model's own arithmetic takes, from 0 to 1.

    tokens_per_second and peak_flops (FLOP/s): of all devices together, or of one.
    """
    return tokens_per_second * flops_per_token / peak_flops
