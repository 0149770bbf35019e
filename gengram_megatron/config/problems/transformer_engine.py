"""What Transformer Engine asks for: to be installed, GPUs that it knows, and sizes for fp8."""

import importlib.util
from collections.abc import Iterator

from gengram_megatron.config.problems.sizes import expert_tensor, sequence_parallel
from gengram_megatron.config.schema import Config

TRANSFORMER_ENGINE = "transformer_engine"
CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The compute capability that a recipe of fp8 needs: that of Ada, Hopper and Blackwell."""
BELOW = {"mxfp8": (12, 0)}
"""And the one from which on Transformer Engine (2.11) does not know a recipe: Blackwell of other
chips than those of data centres."""
MULTIPLE = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Of which both sides of a matrix must be multiples in fp8."""
BLOCK = 128
"""And what tensor-parallel ranks gather from each other with the recipe blockwise."""


def installation_problems(config: Config) -> Iterator[str]:
    """A sentence if what the config asks for is not installed, or fp8 without it."""
    if config.model.implementation != TRANSFORMER_ENGINE:
        if config.train.precision == "fp8":
            yield (
                "train.precision is fp8, which Transformer Engine computes, but "
                f"model.implementation is {config.model.implementation}: set it to "
                "transformer_engine, or precision to bf16"
            )
    elif importlib.util.find_spec(TRANSFORMER_ENGINE) is None:
        yield (
            "model.implementation is transformer_engine, which is not installed here: install "
            "transformer-engine[pytorch], or set model.implementation to torch"
        )


def gpu_problems(config: Config, capability: tuple[int, int] | None) -> Iterator[str]:
    """capability: compute capability of the oldest GPU; None: there is no GPU."""
    recipe = config.train.fp8.recipe
    if config.model.implementation != TRANSFORMER_ENGINE:
        return
    if capability is None:
        yield (
            "model.implementation is transformer_engine, which needs a GPU, and torch sees none "
            "here: set model.implementation to torch"
        )
    elif config.train.precision == "fp8":
        least, below = CAPABILITY[recipe], BELOW.get(recipe)
        if capability < least or (below and capability >= below):
            needed = f"{_dotted(least)} or more" + (f", below {_dotted(below)}" if below else "")
            yield (
                f"train.precision is fp8 with train.fp8.recipe {recipe}, which needs GPUs of "
                f"compute capability {needed}, and here is one of {_dotted(capability)}: set "
                "another recipe, or precision to bf16"
            )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def precision_problems(config: Config) -> Iterator[str]:
    """Of Transformer Engine's kernels."""
    engine, context = config.model.implementation == TRANSFORMER_ENGINE, config.parallel.context
    if engine and config.train.precision == "fp32" and context > 1:
        yield (
            f"train.precision is fp32 with parallel.context = {context}, where Transformer Engine "
            "has no attention: set precision to bf16, or model.implementation to torch"
        )
    if config.train.precision == "fp8":
        yield from _fp8_problems(config)


def _fp8_problems(config: Config) -> Iterator[str]:
    recipe = config.train.fp8.recipe
    demands = [(MULTIPLE[recipe], _sides_of_products(config))]
    if recipe == "blockwise" and sequence_parallel(config):
        demands = [*demands, (BLOCK, _sides_of_the_stream(config))]
    for multiple, sides in demands:
        for name, (size, parts) in sides.items():
            # That the parts are equal is checked elsewhere.
            if size % parts == 0 and size // parts % multiple:
                yield (
                    f"{name} is {size // parts}, which fp8 cannot use with train.fp8.recipe "
                    f"{recipe}: make it a multiple of {multiple}"
                )


def _sides_of_the_stream(config: Config) -> dict[str, tuple[int, int]]:
    """Of the hidden state on one rank, each as a size and the parts that it is cut into."""
    tokens, parallel = config.train.micro_batch_size * config.model.seq_length, config.parallel
    ranks = parallel.context * (parallel.tensor if sequence_parallel(config) else 1)
    return {
        "model.hidden_size": (config.model.hidden_size, 1),
        "train.micro_batch_size * model.seq_length / (parallel.context * parallel.tensor, that only "
        "with parallel.sequence), tokens on a rank,": (tokens, ranks),
    }


def _sides_of_products(config: Config) -> dict[str, tuple[int, int]]:
    """Rows and columns of all matrices that are multiplied in fp8 on one rank. Tokens of an expert
    are as many as the router sends: Transformer Engine fills them up."""
    model, parallel = config.model, config.parallel
    sides = {**_sides_of_the_stream(config), **_sides_of_attention(config)}
    if model.num_experts is None:
        sides["model.ffn_hidden_size / parallel.tensor"] = (model.ffn_hidden_size, parallel.tensor)
    else:
        parts = expert_tensor(config)
        sides["model.ffn_hidden_size / parallel.expert_tensor"] = (model.ffn_hidden_size, parts)
    return sides


def _sides_of_attention(config: Config) -> dict[str, tuple[int, int]]:
    model, tensor = config.model, config.parallel.tensor
    heads, mla = model.num_attention_heads, model.mla
    if model.attention != "mla":
        groups = model.num_query_groups or heads
        return {
            "model.hidden_size / parallel.tensor": (model.hidden_size, tensor),
            "model.hidden_size * (1 + 2 * num_query_groups / num_attention_heads) / "
            "parallel.tensor": (model.hidden_size // heads * (heads + 2 * groups), tensor),
        }
    across_heads = {
        "(mla.qk_head_dim + mla.qk_pos_emb_head_dim)": mla.qk_head_dim + mla.qk_pos_emb_head_dim,
        "(mla.qk_head_dim + mla.v_head_dim)": mla.qk_head_dim + mla.v_head_dim,
        "mla.v_head_dim": mla.v_head_dim,
    }
    latent = {
        "mla.q_lora_rank": mla.q_lora_rank or 0,
        "mla.kv_lora_rank": mla.kv_lora_rank,
        "mla.kv_lora_rank + mla.qk_pos_emb_head_dim": mla.kv_lora_rank + mla.qk_pos_emb_head_dim,
    }
    return {
        **{
            f"model.num_attention_heads * {name} / parallel.tensor": (heads * width, tensor)
            for name, width in across_heads.items()
        },
        **{f"model.{name}": (size, 1) for name, size in latent.items()},
    }
