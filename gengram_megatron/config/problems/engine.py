"""What train.engine deepspeed asks for, and what it cannot be combined with."""

import importlib.util
from collections.abc import Iterator

from gengram_megatron.config.schema import Config, DeepSpeed

INSTALL = "pip install --no-build-isolation deepspeed"
OWN_KEYS = {
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
"""Keys of DeepSpeed's config, and ours that decide them."""


def engine_problems(config: Config) -> Iterator[str]:
    """A sentence for each setting that DeepSpeed cannot do, or that only it could."""
    train = config.train
    if train.engine == "megatron":
        if train.deepspeed != DeepSpeed():
            yield (
                "train.deepspeed is given, but train.engine is megatron: set engine to deepspeed, "
                "or take train.deepspeed out"
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
    for name, found, needed in _not_together(config):
        yield (
            f"{name} is {found}, which train.engine deepspeed cannot do: set {name} to {needed}, "
            "or engine to megatron"
        )
    yield from _extra_problems(train.deepspeed)


def _not_together(config: Config) -> Iterator[tuple[str, object, str]]:
    """A key, what it is, and what DeepSpeed needs."""
    parallel, optimizer, gengram = config.parallel, config.optimizer, config.model.gengram
    if parallel.pipeline > 1:
        yield "parallel.pipeline", parallel.pipeline, "1"
    if config.train.deepspeed.zero_stage == 3:
        # With experts by _validate_zero3_moe_compatibility of DeepSpeed's engine.
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
    for theirs, ours in OWN_KEYS.items():
        group, _, name = theirs.rpartition(".")
        inside = settings.extra.get(group, {}) if group else settings.extra
        if isinstance(inside, dict) and name in inside:
            yield (
                f"train.deepspeed.extra has {theirs}, which {ours} decides: take it out of extra"
            )
