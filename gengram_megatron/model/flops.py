"""Parameters and arithmetic of a model, counted from its config alone.

FLOPs are those of matrix products, a multiplication and an addition counting as two. A causal
query sees half of the sequence on average, so attention counts half of the square. The backward
pass has two products for each one of the forward pass.

Left out: norms, activations, softmax, rotary embeddings, residuals and the optimizer, and of
Gengram the look-up, the window sums, the gate and the convolution. They grow only linearly in the
model's widths, and memory bandwidth bounds them, not arithmetic. Recomputed activations are left
out too: utilisation is about the work that the model needs, not about work done twice.
"""

from dataclasses import dataclass

from gengram_megatron.config.schema import Config, Model
from gengram_megatron.config.tables import kmer_tables

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
class Parameters:
    """Numbers of parameters, over all ranks, without copies."""

    total: int
    activated: int
    """All but the experts that a token does not go to; embeddings and tables count whole."""
    gengram: int
    """Tables, projections, gates and outputs of all layers with memory."""
    tables: int


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


def count_parameters(config: Config) -> Parameters:
    """Of the whole model."""
    model = config.model
    hidden, layers = model.hidden_size, model.num_layers
    experts, chosen = _experts(model)
    norms = (2 * layers + 1) * hidden
    embeddings = 2 * model.vocab_size * hidden
    attention = layers * (_attention_weights(model) + _latent_norms(model))
    tables = _memory_layers(model) * _table_weights(model)
    gengram = tables + _memory_layers(model) * (
        _memory_projection(model) + 2 * hidden + _memory_output(model)  # 2: norms of the gate
    )
    shared = norms + embeddings + attention + layers * _router_weights(model) + gengram
    expert = layers * _feed_forward_weights(model)
    return Parameters(
        total=shared + experts * expert,
        activated=shared + chosen * expert,
        gengram=gengram,
        tables=tables,
    )


def forward_flops(config: Config) -> ForwardFlops:
    """A token's, by part."""
    model = config.model
    layers = model.num_layers
    _, chosen = _experts(model)
    query_width, value_width = _head_widths(model)
    heads_width = model.num_attention_heads * (query_width + value_width)
    return ForwardFlops(
        attention_projections=layers * 2 * _attention_weights(model),
        # Two products over seq_length / 2 keys: of queries with keys, of weights with values.
        attention_scores=layers * model.seq_length * heads_width,
        router=layers * 2 * _router_weights(model),
        feed_forward=layers * chosen * 2 * _feed_forward_weights(model),
        gengram=_memory_layers(model) * 2 * _memory_projection(model),
        logits=2 * model.vocab_size * model.hidden_size,
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


def _experts(model: Model) -> tuple[int, int]:
    """Experts a layer, and how many of them a token goes to; a dense model has one."""
    return (1, 1) if model.num_experts is None else (model.num_experts, model.moe_router_topk)


def _head_widths(model: Model) -> tuple[int, int]:
    """Width of a head's query and key, and of its value."""
    if model.attention == "mla":
        return model.mla.qk_head_dim + model.mla.qk_pos_emb_head_dim, model.mla.v_head_dim
    width = model.hidden_size // model.num_attention_heads
    return width, width


def _attention_weights(model: Model) -> int:
    """Elements of one layer's projections."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query_width, value_width = _head_widths(model)
    out = heads * value_width * hidden
    if model.attention != "mla":
        groups = model.num_query_groups or heads
        return hidden * (heads * query_width + groups * (query_width + value_width)) + out
    mla = model.mla
    query = heads * query_width
    from_hidden = hidden * query
    if mla.q_lora_rank is not None:
        from_hidden = mla.q_lora_rank * (hidden + query)
    down = hidden * (mla.kv_lora_rank + mla.qk_pos_emb_head_dim)
    up = mla.kv_lora_rank * heads * (mla.qk_head_dim + value_width)
    return from_hidden + down + up + out


def _latent_norms(model: Model) -> int:
    """Weights of one layer's norms of the compressed keys and queries."""
    return model.mla.kv_lora_rank + (model.mla.q_lora_rank or 0) if model.attention == "mla" else 0


def _feed_forward_weights(model: Model) -> int:
    """Of one expert, or of a dense layer: gate, up and down."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def _router_weights(model: Model) -> int:
    return model.hidden_size * (model.num_experts or 0)


def _memory_layers(model: Model) -> int:
    return len(model.gengram.layers) if model.gengram.enabled else 0


def _table_weights(model: Model) -> int:
    """Of one layer's tables."""
    return sum(table.rows * table.columns for table in kmer_tables(model.gengram))


def _memory_projection(model: Model) -> int:
    """Of one layer's maps from the pooled features to key and value."""
    return 2 * model.hidden_size * len(model.gengram.kmer_sizes) * model.gengram.dim


def _memory_output(model: Model) -> int:
    """Of one layer's convolution or norm, by the form of the output."""
    taps = {"convolution": model.gengram.conv_kernel, "norm": 1, "plain": 0}
    return taps[model.gengram.output] * model.hidden_size
