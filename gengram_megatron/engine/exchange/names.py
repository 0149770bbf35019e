"""Our weights under the names of transformers and of Megatron-LM."""

from collections.abc import Iterator

from gengram_megatron.config.schema import Model
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.engine.exchange.weights import Part, Weight, whole

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""Names of transformers, of the input embedding and of the output layer."""


def huggingface_weights(model: Model, joined: bool | None = None) -> list[Weight]:
    """As in transformers' Llama (dense) or Mixtral (experts), with memory in layers that have it.

    joined: whether the experts of a layer are one tensor; None: as our exports have it.
    """
    joined = model.gengram.enabled if joined is None else joined
    return [
        whole("embedding.word_embeddings.weight", EMBEDDING, *_vocabulary(model)),
        *(w for n in range(model.num_layers) for w in _huggingface_layer(model, n, joined)),
        whole("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size),
        whole("output_layer.weight", OUTPUT, *_vocabulary(model)),
    ]


def is_joined(name: str) -> bool:
    """Whether a name of transformers is that of all experts of a layer."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _huggingface_layer(model: Model, number: int, joined: bool) -> Iterator[Weight]:
    """number: from 0."""
    ours, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
    hidden = model.hidden_size
    yield from _memory(model, number, ours, theirs)
    yield whole(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", hidden)
    yield _query_key_value(model, f"{ours}self_attention.linear_qkv.weight", f"{theirs}self_attn.")
    yield whole(
        f"{ours}self_attention.linear_proj.weight",
        f"{theirs}self_attn.o_proj.weight",
        hidden,
        hidden,
    )
    yield whole(
        f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", hidden
    )
    if model.num_experts is None:
        yield from _dense(model, f"{ours}mlp.", f"{theirs}mlp.")
    elif joined:
        yield from _joined_experts(model, f"{ours}mlp.", f"{theirs}mlp.")
    else:
        yield from _experts(model, f"{ours}mlp.", f"{theirs}block_sparse_moe.")


def megatron_weights(model: Model) -> list[Weight]:
    """As in megatron-core's plain modules, with the published code's memory in each layer."""
    return [
        _same("embedding.word_embeddings.weight", *_vocabulary(model)),
        *(w for n in range(model.num_layers) for w in _megatron_layer(model, n)),
        _same("decoder.final_layernorm.weight", model.hidden_size),
        _same("output_layer.weight", *_vocabulary(model)),
    ]


def _same(name: str, *shape: int) -> Weight:
    return whole(name, name, *shape)


def _megatron_layer(model: Model, number: int) -> Iterator[Weight]:
    """number: from 0."""
    layer = f"decoder.layers.{number}."
    hidden, width, experts = model.hidden_size, model.ffn_hidden_size, model.num_experts
    yield from _memory(model, number, layer, layer)
    yield _same(f"{layer}input_layernorm.weight", hidden)
    for name, shape in _megatron_attention(model).items():
        yield _same(f"{layer}self_attention.{name}.weight", *shape)
    yield _same(f"{layer}pre_mlp_layernorm.weight", hidden)
    if experts is None:
        yield _same(f"{layer}mlp.linear_fc1.weight", 2 * width, hidden)
        yield _same(f"{layer}mlp.linear_fc2.weight", hidden, width)
        return
    yield _same(f"{layer}mlp.router.weight", experts, hidden)
    for name, ours, theirs in (
        ("linear_fc1", (2, width, hidden), (2 * width, hidden)),
        ("linear_fc2", (hidden, width), (hidden, width)),
    ):
        yield Weight(
            f"{layer}mlp.experts.{name}.weight",
            shape=(experts, *ours),
            parts=tuple(
                Part(f"{layer}mlp.experts.local_experts.{expert}.{name}.weight", theirs, (expert,))
                for expert in range(experts)
            ),
        )


def _megatron_attention(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of each weight."""
    hidden, heads, mla = model.hidden_size, model.num_attention_heads, model.mla
    if model.attention != "mla":
        groups, width = model.num_query_groups or heads, hidden // heads
        return {
            "linear_qkv": ((heads + 2 * groups) * width, hidden),
            "linear_proj": (hidden, hidden),
        }
    queries = heads * (mla.qk_head_dim + mla.qk_pos_emb_head_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "linear_kv_down_proj": (mla.kv_lora_rank + mla.qk_pos_emb_head_dim, hidden),
        "kv_layernorm": (mla.kv_lora_rank,),
        "linear_kv_up_proj": (heads * (mla.qk_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        "linear_proj": (hidden, heads * mla.v_head_dim),
    }
    if mla.q_lora_rank is None:
        return {"linear_q_proj": (queries, hidden), **shapes}
    return {
        "linear_q_down_proj": (mla.q_lora_rank, hidden),
        "q_layernorm": (mla.q_lora_rank,),
        "linear_q_up_proj": (queries, mla.q_lora_rank),
        **shapes,
    }


def _vocabulary(model: Model) -> tuple[int, int]:
    return model.vocab_size, model.hidden_size


def _query_key_value(model: Model, key: str, prefix: str) -> Weight:
    """Ours is a row of heads a group: its queries, its key, its value."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    groups, width = model.num_query_groups or heads, hidden // heads
    queries = heads // groups
    every = slice(None)
    return Weight(
        key,
        shape=((heads + 2 * groups) * width, hidden),
        view=(groups, queries + 2, width, hidden),
        parts=(
            Part(f"{prefix}q_proj.weight", (hidden, hidden), (every, slice(queries))),
            Part(f"{prefix}k_proj.weight", (groups * width, hidden), (every, queries)),
            Part(f"{prefix}v_proj.weight", (groups * width, hidden), (every, queries + 1)),
        ),
    )


def _dense(model: Model, ours: str, theirs: str) -> Iterator[Weight]:
    hidden, width = model.hidden_size, model.ffn_hidden_size
    yield Weight(
        f"{ours}linear_fc1.weight",
        shape=(2 * width, hidden),
        view=(2, width, hidden),
        parts=tuple(
            Part(f"{theirs}{name}.weight", (width, hidden), (place,))
            for place, name in enumerate(("gate_proj", "up_proj"))
        ),
    )
    yield whole(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", hidden, width)


def _experts(model: Model, ours: str, theirs: str) -> Iterator[Weight]:
    """As Mixtral's files have them: a tensor an expert."""
    hidden, width, experts = model.hidden_size, model.ffn_hidden_size, model.num_experts
    yield whole(f"{ours}router.weight", f"{theirs}gate.weight", experts, hidden)
    yield Weight(
        f"{ours}experts.linear_fc1.weight",
        shape=(experts, 2, width, hidden),
        parts=tuple(
            Part(f"{theirs}experts.{expert}.{name}.weight", (width, hidden), (expert, place))
            for expert in range(experts)
            for place, name in enumerate(("w1", "w3"))
        ),
    )
    yield Weight(
        f"{ours}experts.linear_fc2.weight",
        shape=(experts, hidden, width),
        parts=tuple(
            Part(f"{theirs}experts.{expert}.w2.weight", (hidden, width), (expert,))
            for expert in range(experts)
        ),
    )


def _joined_experts(model: Model, ours: str, theirs: str) -> Iterator[Weight]:
    """As transformers has them in memory, and as models with code of their own are saved."""
    hidden, width, experts = model.hidden_size, model.ffn_hidden_size, model.num_experts
    yield whole(f"{ours}router.weight", f"{theirs}gate.weight", experts, hidden)
    yield Weight(
        f"{ours}experts.linear_fc1.weight",
        shape=(experts, 2, width, hidden),
        parts=(Part(f"{theirs}experts.gate_up_proj", (experts, 2 * width, hidden)),),
    )
    yield whole(
        f"{ours}experts.linear_fc2.weight", f"{theirs}experts.down_proj", experts, hidden, width
    )


def _memory(model: Model, number: int, ours: str, theirs: str) -> Iterator[Weight]:
    """Under the names of the code that was published with the paper."""
    gengram, hidden = model.gengram, model.hidden_size
    if not gengram.enabled or number + 1 not in gengram.layers:
        return
    ours, theirs = f"{ours}memory.", f"{theirs}gengram."
    for place, table in enumerate(kmer_tables(gengram)):
        key, name = f"{ours}tables.weights.{table.name}", f"{theirs}embeddings.{place}.weight"
        yield whole(key, name, table.rows, table.columns)
    sizes = len(gengram.kmer_sizes)
    yield Weight(
        f"{ours}projection.weight",
        shape=(2, hidden, sizes, gengram.dim),
        parts=tuple(
            Part(f"{theirs}{name}.weight", (hidden, sizes * gengram.dim), (place,))
            for place, name in enumerate(("key_proj", "value_proj"))
        ),
    )
    if gengram.projection_bias:
        yield Weight(
            f"{ours}projection.bias",
            shape=(2 * hidden,),
            view=(2, hidden),
            parts=tuple(
                Part(f"{theirs}{name}.bias", (hidden,), (place,))
                for place, name in enumerate(("key_proj", "value_proj"))
            ),
        )
    yield whole(f"{ours}gate.norm_hidden.weight", f"{theirs}norm_q.weight", hidden)
    yield whole(f"{ours}gate.norm_key.weight", f"{theirs}norm_k.weight", hidden)
    if gengram.output == "convolution":
        taps = gengram.conv_kernel
        part = Part(f"{theirs}short_conv.conv.weight", (hidden, 1, taps), turned=True)
        yield Weight(f"{ours}output.weight", (taps, hidden), (part,))
    elif gengram.output == "norm":
        yield whole(f"{ours}output.norm.weight", f"{theirs}norm_o.weight", hidden)
