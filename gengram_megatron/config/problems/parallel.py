"""Checks of sizes that parallelism must divide, and of batches, optimizer and checkpoints."""

import math
from collections.abc import Iterator

from gengram_megatron.config.problems.model import (
    expert_tensor,
    multiple,
    ranks_of_a_copy,
    ranks_of_the_experts,
    sequence_parallel,
)
from gengram_megatron.config.schema import Config


def split_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each size that tensor parallelism cannot split into equal parts."""
    model, tensor = config.model, config.parallel.tensor
    parts = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.vocab_size": model.vocab_size,
    }
    if model.attention == "gqa" and model.num_query_groups is not None:
        # megatron-core can also replicate key-value heads; here every rank has its own.
        parts["model.num_query_groups"] = model.num_query_groups
    if model.num_experts is None:
        parts["model.ffn_hidden_size"] = model.ffn_hidden_size
    if model.gengram.enabled:
        parts["model.gengram.dim"] = model.gengram.dim
    for name, size in parts.items():
        yield from multiple(name, size, "parallel.tensor", tensor)
    if model.num_experts is not None:
        null = config.parallel.expert_tensor is None
        yield from multiple(
            "model.ffn_hidden_size",
            model.ffn_hidden_size,
            "parallel.expert_tensor (null: parallel.tensor)" if null else "parallel.expert_tensor",
            expert_tensor(config),
        )


def pipeline_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each reason why the layers cannot be split into pipeline stages."""
    parallel = config.parallel
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual == 1:
        yield "parallel.virtual_pipeline is 1, which means no interleaving; write null for that"
    elif virtual is not None and pipeline == 1:
        yield (
            f"parallel.virtual_pipeline is {virtual}, but parallel.pipeline is 1: set "
            "virtual_pipeline to null, or pipeline to 2 or more"
        )
    elif fixed_stages := _stages_with_fixed_layers(config):
        yield from _uneven_problems(config, fixed_stages)
    else:
        yield from multiple(
            "model.num_layers",
            config.model.num_layers,
            "parallel.pipeline * parallel.virtual_pipeline" if virtual else "parallel.pipeline",
            pipeline * (virtual or 1),
        )


def _stages_with_fixed_layers(config: Config) -> dict[str, int]:
    """Returns the keys that fix the number of layers of a pipeline stage, and their values, if they
    are set."""
    parallel = config.parallel
    layers = {
        "parallel.first_stage_layers": parallel.first_stage_layers,
        "parallel.last_stage_layers": parallel.last_stage_layers,
    }
    return {name: count for name, count in layers.items() if count is not None}


def _uneven_problems(config: Config, fixed_stages: dict[str, int]) -> Iterator[str]:
    """Yields a sentence for each problem with uneven pipeline stages. All stages without a fixed
    number of layers must get the same number, in virtual chunks of equal size."""
    layers, pipeline = config.model.num_layers, config.parallel.pipeline
    virtual = config.parallel.virtual_pipeline
    if pipeline == 1:
        for name, count in fixed_stages.items():
            yield (
                f"{name} is {count}, but parallel.pipeline is 1, so that one stage has all "
                "layers: set it to null, or pipeline to 2 or more"
            )
        return
    for name, count in fixed_stages.items():
        yield from multiple(name, count, "parallel.virtual_pipeline", virtual or 1)
    names, given = " + ".join(fixed_stages), sum(fixed_stages.values())
    other_stages, rest = pipeline - len(fixed_stages), layers - given
    if other_stages == 0 and rest:
        yield (
            f"{names} is {given}, but model.num_layers is {layers} and parallel.pipeline = 2 has "
            f"no other stage: set one of them to null, or make their sum {layers}"
        )
    elif other_stages == 0 and virtual:
        # megatron-core 0.16.1 divides by the number of other stages.
        yield (
            f"{names} is {given} on parallel.pipeline = 2, where parallel.virtual_pipeline = "
            f"{virtual} allows only one of them: set the other to null, which gives the same "
            "placement"
        )
    elif other_stages and rest < 1:
        yield (
            f"{names} is {given}, which leaves none of model.num_layers = {layers} for the other "
            f"stages of parallel.pipeline = {pipeline}; lower it, or raise num_layers"
        )
    elif other_stages:
        yield from multiple(
            f"what {names} leaves of model.num_layers",
            rest,
            "the other stages" + (" * parallel.virtual_pipeline" if virtual else ""),
            other_stages * (virtual or 1),
        )


def sequence_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each reason why the sequence cannot be split over the ranks."""
    parallel, length = config.parallel, config.model.seq_length
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence is true, but parallel.tensor is 1, so there is nothing to split: "
            "set sequence to null, or tensor to 2 or more"
        )
    factors = {}
    if parallel.context > 1:
        # Each rank takes one chunk from the front and one from the back, to balance the work of
        # causal attention.
        factors["2 * parallel.context"] = 2 * parallel.context
    if sequence_parallel(config):
        factors["parallel.tensor"] = parallel.tensor
    yield from multiple(
        "model.seq_length", length, " * ".join(factors), math.prod(factors.values())
    )


def world_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yields a sentence for each reason why this number of processes does not fit the layout."""
    parallel = config.parallel
    copy, experts = ranks_of_a_copy(config), ranks_of_the_experts(config)
    if world_size % copy:
        yield (
            f"the world size is {world_size}, which is not a multiple of parallel.tensor * "
            f"pipeline * context = {parallel.tensor} * {parallel.pipeline} * {parallel.context} "
            f"= {copy}; start a multiple of {copy} processes, or lower one of these keys"
        )
    elif world_size % experts and config.model.num_experts is not None:
        yield (
            f"the world size is {world_size}, which is not a multiple of the experts' "
            f"parallel.expert_tensor * expert * pipeline = {expert_tensor(config)} * "
            f"{parallel.expert} * {parallel.pipeline} = {experts}; start a multiple of {experts} "
            "processes, or lower one of these keys"
        )


def batch_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yields a sentence for each problem with the length of the run or with dividing its batches
    over ranks and microbatches."""
    train, parallel = config.train, config.parallel
    if (train.steps is None) == (train.samples is None):
        what, remedy = "neither is given", "give one"
        if train.steps is not None:
            what, remedy = "both are given", "set the other to null, as in train.samples=null"
        yield f"the length of the run is train.steps or train.samples, but {what}; {remedy}"
    if train.samples is not None and train.samples < train.global_batch_size:
        yield (
            f"train.samples is {train.samples}, less than one step of train.global_batch_size = "
            f"{train.global_batch_size}; raise samples or lower the batch"
        )
    if world_size % ranks_of_a_copy(config):
        return  # the data-parallel size is not known
    data = world_size // ranks_of_a_copy(config)
    per_microbatch = train.micro_batch_size * data
    if train.global_batch_size % per_microbatch:
        yield (
            f"train.global_batch_size is {train.global_batch_size}, which is not a multiple of "
            f"train.micro_batch_size * data-parallel size = {train.micro_batch_size} * {data}; "
            "change the batch, or the number of processes"
        )
        return
    microbatches, virtual = train.global_batch_size // per_microbatch, parallel.virtual_pipeline
    if virtual is not None and microbatches % parallel.pipeline:
        yield (
            f"with parallel.virtual_pipeline = {virtual} the microbatches of a step must be a "
            f"multiple of parallel.pipeline = {parallel.pipeline}, but train.global_batch_size / "
            f"(micro_batch_size * data-parallel size) is {microbatches}; change the batch"
        )


def optimizer_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each setting of the optimizer that cannot work."""
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr is {optimizer.min_lr:g}, above optimizer.lr = {optimizer.lr:g}; "
            "lower min_lr or raise lr"
        )
    if optimizer.warmup_fraction > optimizer.decay_fraction:
        yield (
            f"optimizer.warmup_fraction is {optimizer.warmup_fraction:g}, more than "
            f"optimizer.decay_fraction = {optimizer.decay_fraction:g}; the warm-up must end "
            "before the decay does"
        )
    pipeline, gengram = config.parallel.pipeline, config.model.gengram.enabled
    if not optimizer.distributed and config.train.dtype == "bf16" and pipeline > 1 and gengram:
        # A stage without Gengram has no tables. megatron-core 0.16.1 writes an empty parameter
        # group for them, which it cannot read back.
        yield (
            f"optimizer.distributed is false with train.precision {config.train.precision}, "
            f"parallel.pipeline = {pipeline} and Gengram; megatron-core may be unable to read back "
            "the checkpoints of such a run: set distributed to true"
        )
    if optimizer.overlap_param_gather:
        for name in ("distributed", "overlap_grad_reduce"):
            if not getattr(optimizer, name):
                yield (
                    f"optimizer.overlap_param_gather needs optimizer.{name}, which is false; "
                    f"set {name} to true, or overlap_param_gather to false"
                )


def checkpoint_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each setting of checkpoints that cannot work."""
    interval, keep_every = config.checkpoint.interval, config.checkpoint.keep_every
    if keep_every and (interval is None or keep_every % interval):
        yield (
            f"checkpoint.keep_every is {keep_every}, which is not a multiple of checkpoint.interval "
            f"({interval}), so no checkpoint would be kept by it: change one of them"
        )
