"""Numbers of weights of a model's parts, and what tensor-parallel ranks hold of each part."""

from dataclasses import dataclass

from gengram_megatron.config.schema import Config, Model
from gengram_megatron.config.tables import kmer_tables


@dataclass(frozen=True)
class Weights:
    """cut: elements of which each tensor-parallel rank holds an equal share; whole: elements that
    each of them holds."""

    cut: int = 0
    whole: int = 0

    @property
    def total(self) -> int:
        """Without copies."""
        return self.cut + self.whole

    def held(self, tensor: int) -> int:
        """By each of so many tensor-parallel ranks."""
        return self.cut // tensor + self.whole

    def __add__(self, other: "Weights") -> "Weights":
        return Weights(self.cut + other.cut, self.whole + other.whole)

    def __rmul__(self, times: int) -> "Weights":
        return Weights(times * self.cut, times * self.whole)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, over all ranks, without copies."""

    total: int
    activated: int
    """All but the experts that a token does not go to; embeddings and tables count whole."""
    gengram: int
    """Tables, projections, gates and outputs of all layers with memory."""
    tables: int


def experts(model: Model) -> tuple[int, int]:
    """Experts a layer, and how many of them a token goes to; a dense model has one."""
    return (1, 1) if model.num_experts is None else (model.num_experts, model.moe_router_topk)


def head_widths(model: Model) -> tuple[int, int]:
    """Width of a head's query and key, and of its value."""
    if model.attention == "mla":
        return model.mla.qk_head_dim + model.mla.qk_pos_emb_head_dim, model.mla.v_head_dim
    width = model.hidden_size // model.num_attention_heads
    return width, width


def key_value_heads(model: Model) -> int:
    """Heads of keys and values that attention works with."""
    return model.num_query_groups or model.num_attention_heads


def attention_projections(model: Model) -> Weights:
    """One layer's. mla: what compresses is whole on every rank."""
    heads, hidden = model.num_attention_heads, model.hidden_size
    query_width, value_width = head_widths(model)
    query, out = heads * query_width, heads * value_width * hidden
    if model.attention != "mla":
        return Weights(cut=hidden * (query + key_value_heads(model) * 2 * value_width) + out)
    mla = model.mla
    compressed = mla.q_lora_rank or 0
    up = mla.kv_lora_rank * heads * (mla.qk_head_dim + value_width)
    down = mla.kv_lora_rank + mla.qk_pos_emb_head_dim + compressed
    return Weights(cut=(compressed or hidden) * query + up + out, whole=hidden * down)


def attention_norms(model: Model) -> Weights:
    """One layer's norms of compressed keys and queries, which only mla has."""
    if model.attention != "mla":
        return Weights()
    return Weights(whole=model.mla.kv_lora_rank + (model.mla.q_lora_rank or 0))


def feed_forward(model: Model) -> int:
    """One expert's, or a dense layer's: gate, up and down. Ranks share them equally."""
    return 3 * model.hidden_size * model.ffn_hidden_size


def router(model: Model) -> Weights:
    """One layer's."""
    return Weights(whole=model.hidden_size * (model.num_experts or 0))


def gengram_layers(model: Model) -> list[int]:
    """Numbers of the layers with memory, from 1."""
    return model.gengram.layers if model.gengram.enabled else []


def tables(model: Model) -> int:
    """One memory's; config/tables.py says who holds them."""
    return sum(table.rows * table.columns for table in kmer_tables(model.gengram))


def gengram_projection(model: Model) -> Weights:
    """One memory's maps from the pooled features to key and value, without bias."""
    return Weights(cut=2 * model.hidden_size * len(model.gengram.kmer_sizes) * model.gengram.dim)


def gengram_rest(model: Model) -> Weights:
    """One memory's bias of key and value, its gate, which has two norms, and its convolution or
    norm by the output's form."""
    biases = 2 if model.gengram.projection_bias else 0
    taps = {"convolution": model.gengram.conv_kernel, "norm": 1, "plain": 0}
    return Weights(whole=(biases + 2 + taps[model.gengram.output]) * model.hidden_size)


def embedding(model: Model) -> Weights:
    """The input's, and as many again are the output's."""
    return Weights(cut=model.vocab_size * model.hidden_size)


def norm(model: Model) -> Weights:
    """One of two a layer, or the last."""
    return Weights(whole=model.hidden_size)


def count_parameters(config: Config) -> Parameters:
    """The parameters of the whole model."""
    model = config.model
    layers, memories = model.num_layers, len(gengram_layers(model))
    number, chosen = experts(model)
    all_tables = memories * tables(model)
    gengram = all_tables + memories * (gengram_projection(model) + gengram_rest(model)).total
    layer = attention_projections(model) + attention_norms(model) + router(model) + 2 * norm(model)
    shared = (2 * embedding(model) + layers * layer + norm(model)).total + gengram
    expert = layers * feed_forward(model)
    return Parameters(
        total=shared + number * expert,
        activated=shared + chosen * expert,
        gengram=gengram,
        tables=all_tables,
    )
