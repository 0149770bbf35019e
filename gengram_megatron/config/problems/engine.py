"""Requirements of DeepSpeed and Transformer Engine, and settings that they do not support."""

import importlib.util
from collections.abc import Iterator

from gengram_megatron.config.problems.model import expert_tensor, sequence_parallel
from gengram_megatron.config.schema import Config, DeepSpeed

INSTALL = "pip install --no-build-isolation deepspeed"
MANAGED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "managed_gradient_accumulation": "train.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer": "the section optimizer",
    "scheduler": "the section optimizer",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "communication_data_type": "train.precision",
    "tensor_parallel": "the section parallel",
    "expert_parallel": "the section parallel",
    "sequence_parallel_size": "the section parallel",
    "zero_allow_untested_optimizer": "train.engine",
    "zero_force_ds_cpu_optimizer": "train.engine",
    "zero_optimization.stage": "train.deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "train.deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "train.deepspeed.offload_parameters",
}
"""Keys of DeepSpeed's config that may not be given in `extra`, and our keys that decide them."""


def engine_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each setting that DeepSpeed does not support, or that only DeepSpeed
    supports."""
    train = config.train
    if train.engine == "megatron":
        if train.deepspeed != DeepSpeed():
            yield (
                "train.deepspeed is given, but train.engine is megatron: set engine to deepspeed, "
                "or remove train.deepspeed"
            )
        return
    if importlib.util.find_spec("deepspeed") is None:
        yield (
            f"train.engine is deepspeed, which is not installed here: run `{INSTALL}` where torch "
            "is installed, or set engine to megatron"
        )
    if train.deepspeed.offload_parameters and train.deepspeed.zero_stage < 3:
        yield (
            f"train.deepspeed.offload_parameters is true with zero_stage "
            f"{train.deepspeed.zero_stage}, which keeps all weights on every rank: set zero_stage "
            "to 3, or offload_parameters to false"
        )
    for name, value, needed in _unsupported(config):
        yield (
            f"{name} is {value}, which train.engine deepspeed does not support: set {name} to "
            f"{needed}, or engine to megatron"
        )
    yield from _extra_problems(train.deepspeed)


def _unsupported(config: Config) -> Iterator[tuple[str, object, str]]:
    """Yields the key, the value and the value that DeepSpeed needs, for each setting that it does
    not support."""
    parallel, optimizer, gengram = config.parallel, config.optimizer, config.model.gengram
    if parallel.pipeline > 1:
        yield "parallel.pipeline", parallel.pipeline, "1"
    if config.train.deepspeed.zero_stage == 3:
        # For experts, see _validate_zero3_moe_compatibility in DeepSpeed's engine.
        for name in ("tensor", "expert", "expert_tensor"):
            ranks = getattr(parallel, name) or 1
            if ranks > 1:
                yield "train.deepspeed.zero_stage", f"3 with parallel.{name} {ranks}", "2"
    if config.model.implementation == "transformer_engine":
        yield "model.implementation", "transformer_engine", "torch"
    if gengram.enabled and gengram.split == "rows":
        yield "model.gengram.split", "rows", "columns"
    if not optimizer.distributed:
        yield "optimizer.distributed", "false", "true"
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(optimizer, name):
            yield f"optimizer.{name}", "true", "false"


def _extra_problems(settings: DeepSpeed) -> Iterator[str]:
    for deepspeed_key, our_key in MANAGED_KEYS.items():
        group, _, name = deepspeed_key.rpartition(".")
        section = settings.extra.get(group, {}) if group else settings.extra
        if isinstance(section, dict) and name in section:
            yield (
                f"train.deepspeed.extra has {deepspeed_key}, which {our_key} decides: "
                "remove it from extra"
            )


TRANSFORMER_ENGINE = "transformer_engine"
CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Lowest compute capability that each fp8 recipe needs: that of Ada, Hopper and Blackwell."""
BELOW = {"mxfp8": (12, 0)}
"""Compute capability from which on Transformer Engine (2.11) no longer supports a recipe. 12.0 is
that of Blackwell GPUs outside data centres."""
MULTIPLE = {"tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Both sides of a matrix must be multiples of this in fp8, by recipe."""
BLOCK = 128
"""Both sides of what tensor-parallel ranks gather from each other must be multiples of this with
the recipe blockwise."""


def installation_problems(config: Config) -> Iterator[str]:
    """Yields a sentence if Transformer Engine is needed but not installed, or if fp8 is set without
    it."""
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


def gpu_problems(config: Config, capability: tuple[int, ...] | None) -> Iterator[str]:
    """Yields a sentence for each setting that the GPUs do not support.

    Args:
        capability: compute capability of the oldest GPU; None without a GPU.
    """
    recipe = config.train.fp8.recipe
    if config.model.implementation != TRANSFORMER_ENGINE:
        return
    if capability is None:
        yield (
            "model.implementation is transformer_engine, which needs a GPU, and torch sees none "
            "here: set model.implementation to torch"
        )
    elif config.train.precision == "fp8":
        minimum, below = CAPABILITY[recipe], BELOW.get(recipe)
        if capability < minimum or (below and capability >= below):
            needed = f"{_dotted(minimum)} or more" + (f", below {_dotted(below)}" if below else "")
            yield (
                f"train.precision is fp8 with train.fp8.recipe {recipe}, which needs GPUs of "
                f"compute capability {needed}, but one here has {_dotted(capability)}: set "
                "another recipe, or precision to bf16"
            )


def _dotted(capability: tuple[int, ...]) -> str:
    return ".".join(map(str, capability))


def precision_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each precision or size that Transformer Engine's kernels do not
    support."""
    uses_te, context = config.model.implementation == TRANSFORMER_ENGINE, config.parallel.context
    if uses_te and config.train.precision == "fp32" and context > 1:
        yield (
            f"train.precision is fp32 with parallel.context = {context}, where Transformer Engine "
            "has no attention: set precision to bf16, or model.implementation to torch"
        )
    if config.train.precision == "fp8":
        yield from _fp8_problems(config)


def _fp8_problems(config: Config) -> Iterator[str]:
    recipe = config.train.fp8.recipe
    requirements = [(MULTIPLE[recipe], _sides_of_products(config))]
    if recipe == "blockwise" and sequence_parallel(config):
        requirements = [*requirements, (BLOCK, _sides_of_the_stream(config))]
    for multiple, sides in requirements:
        for name, (size, parts) in sides.items():
            # Unequal parts are reported by other checks.
            if size % parts == 0 and size // parts % multiple:
                yield (
                    f"{name} is {size // parts}, which fp8 cannot use with train.fp8.recipe "
                    f"{recipe}: make it a multiple of {multiple}"
                )


def _sides_of_the_stream(config: Config) -> dict[str, tuple[int, int]]:
    """Returns the sides of the hidden state on one rank, each as its full size and the number of
    parts that it is split into."""
    tokens, parallel = config.train.micro_batch_size * config.model.seq_length, config.parallel
    ranks = parallel.context * (parallel.tensor if sequence_parallel(config) else 1)
    return {
        "model.hidden_size": (config.model.hidden_size, 1),
        "train.micro_batch_size * model.seq_length / (parallel.context * parallel.tensor, the latter "
        "only with parallel.sequence), the number of tokens on a rank,": (tokens, ranks),
    }


def _sides_of_products(config: Config) -> dict[str, tuple[int, int]]:
    """Returns the rows and columns of all matrices that are multiplied in fp8 on one rank, each as
    its full size and the number of parts that it is split into. The tokens of an expert are not
    included: their number varies, and Transformer Engine pads them."""
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
