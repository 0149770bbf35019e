"""What attention and experts ask for."""

from collections.abc import Iterator

from gengram_megatron.config.problems.sizes import expert_tensor, multiple, sequence_parallel
from gengram_megatron.config.schema import Config


def attention_problems(config: Config) -> Iterator[str]:
    """A sentence for each setting of attention that cannot work."""
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.attention == "gqa":
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
            # Its down-projections are whole on every rank, and each rank's gradient of them only
            # knows its own heads; sequence parallelism is what sums them.
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
    """A sentence for each setting of the experts that cannot work."""
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
    """The grouped matrix product reads rows of whole 16 bytes."""
    precision, parts = config.train.dtype, expert_tensor(config)
    multiple = {"bf16": 8, "fp32": 4}[precision]
    if config.model.ffn_hidden_size % parts:
        return  # told elsewhere
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
