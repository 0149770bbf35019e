"""Counts the weights of each part of a model, and how many of them a tensor-parallel rank holds.

Functions named for a part return its number of weights, or `Weights` where it matters which of them
are sharded.
"""

from dataclasses import dataclass

from gengram_megatron.config.schema import Config, Model
from gengram_megatron.config.tables import kmer_tables


@dataclass(frozen=True)
class Weights:
    """A number of weights.

    Attributes:
        sharded: weights of which each tensor-parallel rank holds an equal share.
        replicated: weights of which each tensor-parallel rank holds a copy.
    """

    sharded: int = 0
    replicated: int = 0

    @property
    def total(self) -> int:
        """The number of weights, copies not counted."""
        return self.sharded + self.replicated

    def per_rank(self, tensor: int) -> int:
        """Returns the number of weights that each of `tensor` tensor-parallel ranks holds."""
        return self.sharded // tensor + self.replicated

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.sharded + other.sharded, self.replicated + other.replicated)

    def __rmul__(self, times: int) -> "Weights":
        return Weights(times * self.sharded, times * self.replicated)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters over all ranks, copies not counted."""

    total: int
    activated: int
    """All except the experts that a token is not routed to. Embeddings and tables count fully."""
    gengram: int
    """Tables, projections, gates and outputs of all Gengram layers."""
    tables: int


def experts(model: Model) -> tuple[int, int]:
    """Returns the number of experts per layer and of experts per token; (1, 1) for a dense
    model."""
    return (1, 1) if model.num_experts is None else (model.num_experts, model.moe_router_topk)


def head_widths(model: Model) -> tuple[int, int]:
    """Returns the width of a head's query and key, and of its value."""
    if model.attention == "mla":
        return model.mla.qk_head_dim + model.mla.qk_pos_emb_head_dim, model.mla.v_head_dim
    width = model.hidden_size // model.num_attention_heads
    return width, width


def key_value_heads(model: Model) -> int:
    """Returns the number of key-value heads."""
    return model.num_query_groups or model.num_attention_heads


def attention_projections(model: Model) -> Weights:
    """Returns the weights of one layer's attention projections. With mla, the down-projections are
    replicated."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query_width, value_width = head_widths(model)
    query, out = heads * query_width, heads * value_width * hidden
    if model.attention != "mla":
        return Weights(sharded=hidden * (query + key_value_heads(model) * 2 * value_width) + out)
    mla = model.mla
    compressed = mla.q_lora_rank or 0
    up = mla.kv_lora_rank * heads * (mla.qk_head_dim + value_width)
    down = mla.kv_lora_rank + mla.qk_pos_emb_head_dim + compressed
    return Weights(sharded=(compressed or hidden) * query + up + out, replicated=hidden * down)


def attention_norms(model: Model) -> Weights:
    """Returns the weights of one layer's norms of latent keys and queries, which only mla has."""
    if model.attention != "mla":
        return Weights()
    return Weights(replicated=model.mla.kv_lora_rank + (model.mla.q_lora_rank or 0))


def feed_forward(model: Model) -> int:
    """Returns the number of weights of one expert, or of a dense layer's feed-forward: gate, up and
    down projections. All are sharded."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def router(model: Model) -> Weights:
    """Returns the weights of one layer's router."""
    return Weights(replicated=model.hidden_size * (model.num_experts or 0))


def gengram_layers(model: Model) -> list[int]:
    """Returns the numbers of the Gengram layers, counted from 1; empty without Gengram."""
    return model.gengram.layers if model.gengram.enabled else []


def tables(model: Model) -> int:
    """Returns the number of weights of one Gengram layer's tables. config/tables.py decides which
    ranks hold them."""
    return sum(table.rows * table.columns for table in kmer_tables(model.gengram))


def gengram_projection(model: Model) -> Weights:
    """Returns the weights of one Gengram layer's projections from the pooled features to key and
    value, without bias."""
    features = len(model.gengram.kmer_sizes) * model.gengram.dim
    return Weights(sharded=2 * model.hidden_size * features)


def gengram_rest(model: Model) -> Weights:
    """Returns the other weights of one Gengram layer: the bias of key and value, the two norms of
    the gate, and the convolution or norm of the output."""
    biases = 2 if model.gengram.projection_bias else 0
    taps = {"convolution": model.gengram.conv_kernel, "norm": 1, "plain": 0}
    return Weights(replicated=(biases + 2 + taps[model.gengram.output]) * model.hidden_size)


def embedding(model: Model) -> Weights:
    """Returns the weights of the input embedding. The output layer has as many again."""
    return Weights(sharded=model.vocab_size * model.hidden_size)


def norm(model: Model) -> Weights:
    """Returns the weights of one norm: each layer has two, and the model a final one."""
    return Weights(replicated=model.hidden_size)


def count_parameters(config: Config) -> Parameters:
    """Counts the parameters of the whole model."""
    model = config.model
    layers, with_gengram = model.num_layers, len(gengram_layers(model))
    num_experts, topk = experts(model)
    all_tables = with_gengram * tables(model)
    gengram_dense = with_gengram * (gengram_projection(model) + gengram_rest(model)).total
    gengram = all_tables + gengram_dense
    layer = attention_projections(model) + attention_norms(model) + router(model) + 2 * norm(model)
    outside_experts = (2 * embedding(model) + layers * layer + norm(model)).total + gengram
    expert = layers * feed_forward(model)
    return Parameters(
        total=outside_experts + num_experts * expert,
        activated=outside_experts + topk * expert,
        gengram=gengram,
        tables=all_tables,
    )
