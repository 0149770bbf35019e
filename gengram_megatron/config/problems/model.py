"""Checks of the keys of attention, experts and Gengram, and helpers for other checks: parallel
sizes with nulls resolved, and the message for sizes that do not divide evenly.
"""

from collections.abc import Iterator

from gengram_megatron.config.schema import Config, Gengram, Hashing
from gengram_megatron.config.tables import LARGEST_DIRECT, SMALL_K, kmer_tables


def ranks_of_a_copy(config: Config) -> int:
    """Returns the number of ranks that together hold one copy of the model without its experts."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def ranks_of_the_experts(config: Config) -> int:
    """Returns the number of ranks that together hold one copy of all experts."""
    return expert_tensor(config) * config.parallel.expert * config.parallel.pipeline


def expert_tensor(config: Config) -> int:
    """Returns the tensor-parallel size inside experts."""
    return config.parallel.expert_tensor or config.parallel.tensor


def sequence_parallel(config: Config) -> bool:
    """Returns whether sequence parallelism is on: whether tensor-parallel ranks split the sequence
    where they do not split the layer."""
    if config.parallel.sequence is None:
        return config.parallel.tensor > 1
    return config.parallel.sequence


def multiple(name: str, value: int, of_name: str, of: int) -> Iterator[str]:
    """Yields a sentence if a value is not a multiple of another."""
    if value % of:
        yield f"{name} is {value}, which is not a multiple of {of_name} = {of}; change one of them"


def attention_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each setting of attention that cannot work."""
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.attention == "gqa" and groups is not None:
        yield from multiple("model.num_attention_heads", heads, "model.num_query_groups", groups)
    elif groups not in (None, heads):
        yield (
            f"model.num_query_groups is {groups}, but model.attention is {model.attention}, which "
            "has no groups: set num_query_groups to null, or attention to gqa"
        )
    if model.attention == "mla":
        positional = model.mla.qk_pos_emb_head_dim
        if positional % 2:
            yield (
                f"model.mla.qk_pos_emb_head_dim is {positional}; rotary embeddings turn pairs, "
                "so make it even"
            )
        if config.parallel.tensor > 1 and not sequence_parallel(config):
            # Every rank has a copy of the down-projections, but its gradient of them covers only
            # its own heads. Only sequence parallelism sums these gradients.
            yield (
                f"parallel.sequence is false with parallel.tensor = {config.parallel.tensor}; "
                "model.attention mla on more than one tensor-parallel rank needs "
                "parallel.sequence: true"
            )
        return
    yield from multiple("model.hidden_size", model.hidden_size, "model.num_attention_heads", heads)
    if model.hidden_size % heads == 0 and model.hidden_size // heads % 2:
        yield (
            f"model.hidden_size / model.num_attention_heads is {model.hidden_size // heads}; "
            "rotary embeddings turn pairs, so make this head size even"
        )


def expert_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each setting of the experts that cannot work."""
    model, parallel = config.model, config.parallel
    if model.num_experts is None:
        if parallel.expert > 1:
            yield (
                f"parallel.expert is {parallel.expert}, but model.num_experts is null: "
                "set parallel.expert to 1, or give the model experts"
            )
        if parallel.expert_tensor is not None:
            yield (
                f"parallel.expert_tensor is {parallel.expert_tensor}, but model.num_experts is "
                "null: set parallel.expert_tensor to null, or give the model experts"
            )
        return
    if model.moe_router_topk > model.num_experts:
        yield (
            f"model.moe_router_topk is {model.moe_router_topk}, more than model.num_experts = "
            f"{model.num_experts}; lower it, or give the model more experts"
        )
    yield from multiple("model.num_experts", model.num_experts, "parallel.expert", parallel.expert)
    yield from _grouped_product_problems(config)
    if parallel.tensor > 1 and not sequence_parallel(config):
        # Without it every tensor-parallel rank would route the same tokens, and the experts'
        # gradients would be counted once for each of those ranks.
        yield (
            f"parallel.sequence is false with parallel.tensor = {parallel.tensor} and "
            f"model.num_experts = {model.num_experts}; a mixture of experts on more than one "
            "tensor-parallel rank needs parallel.sequence: true"
        )


def _grouped_product_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each width that the grouped matrix product does not support: its rows
    must be multiples of 16 bytes."""
    precision, parts = config.train.dtype, expert_tensor(config)
    multiple = {"bf16": 8, "fp32": 4}[precision]
    if config.model.ffn_hidden_size % parts:
        return  # reported by split_problems
    widths = {
        "model.hidden_size": config.model.hidden_size,
        "model.ffn_hidden_size / parallel.expert_tensor": config.model.ffn_hidden_size // parts,
    }
    for name, width in widths.items():
        if width % multiple:
            yield (
                f"{name} is {width}, which experts in {precision} cannot use: "
                f"make it a multiple of {multiple}"
            )


def gengram_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each setting of Gengram that cannot work."""
    gengram, model = config.model.gengram, config.model
    if not gengram.enabled:
        return
    layers, sizes = gengram.layers, gengram.kmer_sizes
    if not layers:
        yield "model.gengram.layers is empty; name a layer, or set model.gengram.enabled to false"
    if len(set(layers)) < len(layers):
        yield f"model.gengram.layers is {layers}; name each layer once"
    if beyond := [layer for layer in layers if layer > model.num_layers]:
        yield (
            f"model.gengram.layers names {beyond}, but model.num_layers is {model.num_layers}; "
            f"layers count from 1 to {model.num_layers}"
        )
    if sizes != sorted(set(sizes)):
        yield (
            f"model.gengram.kmer_sizes is {sizes}; write {sorted(set(sizes))}, "
            "each size once and in ascending order"
        )
    if gengram.window is not None and gengram.window < max(sizes):
        yield (
            f"model.gengram.window is {gengram.window}, too small for the {max(sizes)}-mers of "
            f"model.gengram.kmer_sizes; make it at least {max(sizes)}, or null for no window"
        )
    yield from _without_effect(config)
    yield from _table_problems(config)
    if gengram.project == "tables":
        for obstacle, remedy in projection_obstacles(config):
            yield (
                f"model.gengram.project is tables, but {obstacle}: {remedy}, or set project to "
                "features"
            )
    if len(set(gengram.token_ids)) < len(gengram.token_ids):
        yield f"model.gengram.token_ids is {gengram.token_ids}; A C G T N need different ids"
    if max(gengram.token_ids) >= model.vocab_size:
        yield (
            f"model.gengram.token_ids is {gengram.token_ids}, but model.vocab_size is "
            f"{model.vocab_size}; ids go from 0 to {model.vocab_size - 1}"
        )


def _without_effect(config: Config) -> Iterator[str]:
    """Yields a sentence for each setting that would have no effect."""
    gengram, length = config.model.gengram, config.model.seq_length
    if gengram.window is not None and gengram.window > length:
        yield (
            f"model.gengram.window is {gengram.window}, more than model.seq_length = {length}: "
            f"make it at most {length}, or null for no window"
        )
    if gengram.hashing != Hashing() and max(gengram.kmer_sizes) <= LARGEST_DIRECT:
        yield (
            f"model.gengram.hashing is given, but no k of model.gengram.kmer_sizes is above "
            f"{LARGEST_DIRECT}, so no table is hashed: remove hashing, or add such a k"
        )
    kernel = Gengram.model_fields["conv_kernel"].default
    if gengram.conv_kernel != kernel and gengram.output != "convolution":
        yield (
            f"model.gengram.conv_kernel is {gengram.conv_kernel}, but model.gengram.output is "
            f"{gengram.output}: remove conv_kernel, or set output to convolution"
        )


def _table_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each problem with hashing or with splitting tables by rows."""
    gengram, parallel = config.model.gengram, config.parallel
    if max(gengram.kmer_sizes) > LARGEST_DIRECT:
        yield from multiple(
            "model.gengram.dim", gengram.dim, "model.gengram.hashing.heads", gengram.hashing.heads
        )
        if gengram.dim % gengram.hashing.heads == 0:
            yield from multiple(
                "model.gengram.dim / hashing.heads",
                gengram.dim // gengram.hashing.heads,
                "parallel.tensor",
                parallel.tensor,
            )
    try:
        kmer_tables(gengram)
    except ValueError:
        yield (
            f"model.gengram.hashing.rows is {gengram.hashing.rows}, up to which there are not enough "
            "primes for all hashed tables: raise it, or lower model.gengram.hashing.heads"
        )
    over = gengram.rows_over
    if over and gengram.split == "columns":
        yield (
            f"model.gengram.rows_over is {over}, but model.gengram.split is columns: set rows_over "
            "to null, or split to rows or auto"
        )
    if over == "expert" and parallel.expert == 1:
        yield (
            "model.gengram.rows_over is expert, but parallel.expert is 1: set rows_over to data, "
            "or parallel.expert to 2 or more"
        )
    if over == "expert" and expert_tensor(config) != parallel.tensor:
        # Ranks that share experts would then hold different columns of the tables.
        yield (
            f"model.gengram.rows_over is expert, which needs parallel.expert_tensor = "
            f"parallel.tensor, but they are {expert_tensor(config)} and {parallel.tensor}: set "
            "rows_over to data or tensor, or expert_tensor to null"
        )


def projection_obstacles(config: Config) -> Iterator[tuple[str, str]]:
    """Yields each setting that prevents projecting the tables once per step, and its remedy."""
    gengram, largest = config.model.gengram, max(config.model.gengram.kmer_sizes)
    if gengram.kmer_sizes != list(range(1, largest + 1)) or largest > LARGEST_DIRECT:
        yield (
            f"model.gengram.kmer_sizes is {gengram.kmer_sizes}",
            f"give 1, 2, 3 and so on without a gap, up to {LARGEST_DIRECT} at most",
        )
    if gengram.share_reverse_complements:
        yield "model.gengram.share_reverse_complements is true", "set it to false"
    if gengram.deduplicate:
        yield "model.gengram.deduplicate is true", "set it to false"
    if gengram.split == "rows" or (gengram.split == "auto" and largest > SMALL_K):
        yield f"model.gengram.split is {gengram.split}", "set it to columns"
    if config.optimizer.overlap_grad_reduce:
        yield "optimizer.overlap_grad_reduce is true", "set it to false"
    if config.train.engine == "deepspeed":
        # DeepSpeed reduces each gradient during the backward pass, but the gradients of projected
        # tables are computed only once per step.
        yield "train.engine is deepspeed", "set it to megatron"
