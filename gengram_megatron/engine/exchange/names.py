"""Maps our weights to the tensor names of transformers and of Megatron-LM."""

from collections.abc import Iterator

from gengram_megatron.config.schema import Model
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.engine.exchange.weights import Part, Weight, same_tensor

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""The names of the input embedding and the output layer in transformers."""


def huggingface_weights(model: Model, fused: bool | None = None) -> list[Weight]:
    """Returns the mapping to transformers' Llama (dense) or Mixtral (experts), with Gengram weights
    in the layers that have Gengram.

    fused: whether all experts of a layer are one tensor; None means as in our exports.
    """
    fused = model.gengram.enabled if fused is None else fused
    return [
        same_tensor("embedding.word_embeddings.weight", EMBEDDING, *_vocabulary(model)),
        *(w for n in range(model.num_layers) for w in _huggingface_layer(model, n, fused)),
        same_tensor("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size),
        same_tensor("output_layer.weight", OUTPUT, *_vocabulary(model)),
    ]


def is_fused_experts(name: str) -> bool:
    """Returns whether a tensor of transformers holds all experts of a layer."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _huggingface_layer(model: Model, layer: int, fused: bool) -> Iterator[Weight]:
    """Yields the weights of one layer; layer: its index from 0."""
    ours, foreign = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden = model.hidden_size
    yield from _gengram(model, layer, ours, foreign)
    yield same_tensor(f"{ours}input_layernorm.weight", f"{foreign}input_layernorm.weight", hidden)
    yield _query_key_value(model, f"{ours}self_attention.linear_qkv.weight", f"{foreign}self_attn.")
    yield same_tensor(
        f"{ours}self_attention.linear_proj.weight",
        f"{foreign}self_attn.o_proj.weight",
        hidden,
        hidden,
    )
    yield same_tensor(
        f"{ours}pre_mlp_layernorm.weight", f"{foreign}post_attention_layernorm.weight", hidden
    )
    if model.num_experts is None:
        yield from _dense(model, f"{ours}mlp.", f"{foreign}mlp.")
    elif fused:
        yield from _fused_experts(model, model.num_experts, f"{ours}mlp.", f"{foreign}mlp.")
    else:
        yield from _experts(model, model.num_experts, f"{ours}mlp.", f"{foreign}block_sparse_moe.")


def megatron_weights(model: Model) -> list[Weight]:
    """Returns the mapping to megatron-core's local (not Transformer Engine) modules, with the
    published Gengram code's weights in the layers that have Gengram."""
    return [
        _same_name("embedding.word_embeddings.weight", *_vocabulary(model)),
        *(w for n in range(model.num_layers) for w in _megatron_layer(model, n)),
        _same_name("decoder.final_layernorm.weight", model.hidden_size),
        _same_name("output_layer.weight", *_vocabulary(model)),
    ]


def _same_name(name: str, *shape: int) -> Weight:
    return same_tensor(name, name, *shape)


def _megatron_layer(model: Model, layer: int) -> Iterator[Weight]:
    """Yields the weights of one layer; layer: its index from 0."""
    prefix = f"decoder.layers.{layer}."
    hidden, width, experts = model.hidden_size, model.ffn_hidden_size, model.num_experts
    yield from _gengram(model, layer, prefix, prefix)
    yield _same_name(f"{prefix}input_layernorm.weight", hidden)
    for name, shape in _megatron_attention(model).items():
        yield _same_name(f"{prefix}self_attention.{name}.weight", *shape)
    yield _same_name(f"{prefix}pre_mlp_layernorm.weight", hidden)
    if experts is None:
        yield _same_name(f"{prefix}mlp.linear_fc1.weight", 2 * width, hidden)
        yield _same_name(f"{prefix}mlp.linear_fc2.weight", hidden, width)
        return
    yield _same_name(f"{prefix}mlp.router.weight", experts, hidden)
    for name, our_shape, foreign_shape in (
        ("linear_fc1", (2, width, hidden), (2 * width, hidden)),
        ("linear_fc2", (hidden, width), (hidden, width)),
    ):
        yield Weight(
            f"{prefix}mlp.experts.{name}.weight",
            shape=(experts, *our_shape),
            parts=tuple(
                Part(
                    f"{prefix}mlp.experts.local_experts.{expert}.{name}.weight",
                    foreign_shape,
                    (expert,),
                )
                for expert in range(experts)
            ),
        )


def _megatron_attention(model: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each weight of the attention, by name below `self_attention.`."""
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
    """Maps our fused QKV weight, which holds for each query group its query heads, its key head and
    its value head, to three weights."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    groups, width = model.num_query_groups or heads, hidden // heads
    queries = heads // groups
    all_groups = slice(None)
    return Weight(
        key,
        shape=((heads + 2 * groups) * width, hidden),
        view=(groups, queries + 2, width, hidden),
        parts=(
            Part(f"{prefix}q_proj.weight", (hidden, hidden), (all_groups, slice(queries))),
            Part(f"{prefix}k_proj.weight", (groups * width, hidden), (all_groups, queries)),
            Part(f"{prefix}v_proj.weight", (groups * width, hidden), (all_groups, queries + 1)),
        ),
    )


def _dense(model: Model, ours: str, foreign: str) -> Iterator[Weight]:
    hidden, width = model.hidden_size, model.ffn_hidden_size
    yield Weight(
        f"{ours}linear_fc1.weight",
        shape=(2 * width, hidden),
        view=(2, width, hidden),
        parts=tuple(
            Part(f"{foreign}{name}.weight", (width, hidden), (index,))
            for index, name in enumerate(("gate_proj", "up_proj"))
        ),
    )
    yield same_tensor(f"{ours}linear_fc2.weight", f"{foreign}down_proj.weight", hidden, width)


def _experts(model: Model, experts: int, ours: str, foreign: str) -> Iterator[Weight]:
    """Yields router and experts as in the files of Mixtral: a tensor for each expert."""
    hidden, width = model.hidden_size, model.ffn_hidden_size
    yield same_tensor(f"{ours}router.weight", f"{foreign}gate.weight", experts, hidden)
    yield Weight(
        f"{ours}experts.linear_fc1.weight",
        shape=(experts, 2, width, hidden),
        parts=tuple(
            Part(f"{foreign}experts.{expert}.{name}.weight", (width, hidden), (expert, index))
            for expert in range(experts)
            for index, name in enumerate(("w1", "w3"))
        ),
    )
    yield Weight(
        f"{ours}experts.linear_fc2.weight",
        shape=(experts, hidden, width),
        parts=tuple(
            Part(f"{foreign}experts.{expert}.w2.weight", (hidden, width), (expert,))
            for expert in range(experts)
        ),
    )


def _fused_experts(model: Model, experts: int, ours: str, foreign: str) -> Iterator[Weight]:
    """Yields router and experts as transformers holds them once loaded, which is also how it saves
    models with custom code: one tensor for all experts of a layer."""
    hidden, width = model.hidden_size, model.ffn_hidden_size
    yield same_tensor(f"{ours}router.weight", f"{foreign}gate.weight", experts, hidden)
    yield Weight(
        f"{ours}experts.linear_fc1.weight",
        shape=(experts, 2, width, hidden),
        parts=(Part(f"{foreign}experts.gate_up_proj", (experts, 2 * width, hidden)),),
    )
    yield same_tensor(
        f"{ours}experts.linear_fc2.weight", f"{foreign}experts.down_proj", experts, hidden, width
    )


def _gengram(model: Model, layer: int, ours: str, foreign: str) -> Iterator[Weight]:
    """Yields the Gengram weights of a layer, by the names of the code published with the paper.

    layer: its index from 0; ours, foreign: the layer's prefixes.
    """
    gengram, hidden = model.gengram, model.hidden_size
    if not gengram.enabled or layer + 1 not in gengram.layers:
        return
    ours, foreign = f"{ours}memory.", f"{foreign}gengram."
    for index, table in enumerate(kmer_tables(gengram)):
        key, name = f"{ours}tables.weights.{table.name}", f"{foreign}embeddings.{index}.weight"
        yield same_tensor(key, name, table.rows, table.columns)
    sizes = len(gengram.kmer_sizes)
    yield Weight(
        f"{ours}projection.weight",
        shape=(2, hidden, sizes, gengram.dim),
        parts=tuple(
            Part(f"{foreign}{name}.weight", (hidden, sizes * gengram.dim), (index,))
            for index, name in enumerate(("key_proj", "value_proj"))
        ),
    )
    if gengram.projection_bias:
        yield Weight(
            f"{ours}projection.bias",
            shape=(2 * hidden,),
            view=(2, hidden),
            parts=tuple(
                Part(f"{foreign}{name}.bias", (hidden,), (index,))
                for index, name in enumerate(("key_proj", "value_proj"))
            ),
        )
    yield same_tensor(f"{ours}gate.norm_hidden.weight", f"{foreign}norm_q.weight", hidden)
    yield same_tensor(f"{ours}gate.norm_key.weight", f"{foreign}norm_k.weight", hidden)
    if gengram.output == "convolution":
        taps = gengram.conv_kernel
        part = Part(f"{foreign}short_conv.conv.weight", (hidden, 1, taps), transposed=True)
        yield Weight(f"{ours}output.weight", (taps, hidden), (part,))
    elif gengram.output == "norm":
        yield same_tensor(f"{ours}output.norm.weight", f"{foreign}norm_o.weight", hidden)
