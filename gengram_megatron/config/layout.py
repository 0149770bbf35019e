"""Checks between keys, made before any process group starts, and the layout that they allow."""

import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import LARGEST_DIRECT, kmer_tables
from gengram_megatron.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How a run is spread over its processes, with every null of the config resolved."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    context: int
    expert: int
    expert_tensor: int
    sequence: bool
    data: int
    expert_data: int
    num_microbatches: int
    """Microbatches that each data-parallel rank runs a step."""
    steps: int
    samples: int
    """Samples of the whole run: whole global batches only."""


def world_size_from_environment() -> tuple[int, int]:
    """World size and rank as torchrun or srun set them; 1 and 0 for a process on its own."""
    for size_name, rank_name in (("WORLD_SIZE", "RANK"), ("SLURM_NTASKS", "SLURM_PROCID")):
        size, rank = os.environ.get(size_name), os.environ.get(rank_name)
        if size is None and rank is None:
            continue
        if size is None or rank is None:
            there, absent = (rank_name, size_name) if size is None else (size_name, rank_name)
            raise UserError(
                f"the environment has {there} but not {absent}: "
                "start with torchrun or srun, which set both, or unset it"
            )
        if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
            raise UserError(
                f"the environment has {size_name}={size} and {rank_name}={rank}: "
                f"{rank_name} must be a whole number from 0 to {size_name} - 1"
            )
        return int(size), int(rank)
    return 1, 0


def check_layout(config: Config, world_size: int) -> Layout:
    """The layout of a run on so many processes.

    Raises UserError with one line for each thing that cannot work.
    """
    problems = [
        *_installation_problems(config),
        *_attention_problems(config),
        *_expert_problems(config),
        *_gengram_problems(config),
        *_split_problems(config),
        *_pipeline_problems(config),
        *_sequence_problems(config),
        *_world_problems(config, world_size),
        *_batch_problems(config, world_size),
        *_optimizer_problems(config),
        *_checkpoint_problems(config),
    ]
    if problems:
        raise UserError("\n".join(problems))
    parallel, train = config.parallel, config.train
    data = world_size // _ranks_of_a_copy(config)
    steps = train.steps or train.samples // train.global_batch_size
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=_expert_tensor(config),
        sequence=_sequence(config),
        data=data,
        expert_data=world_size // _ranks_of_the_experts(config),
        num_microbatches=train.global_batch_size // (train.micro_batch_size * data),
        steps=steps,
        samples=steps * train.global_batch_size,
    )


def _ranks_of_a_copy(config: Config) -> int:
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def _ranks_of_the_experts(config: Config) -> int:
    return _expert_tensor(config) * config.parallel.expert * config.parallel.pipeline


def _expert_tensor(config: Config) -> int:
    return config.parallel.expert_tensor or config.parallel.tensor


def _sequence(config: Config) -> bool:
    if config.parallel.sequence is None:
        return config.parallel.tensor > 1
    return config.parallel.sequence


def _multiple(name: str, value: int, of_name: str, of: int) -> Iterator[str]:
    """The sentence for a value that must be a multiple of another, where it is not."""
    if value % of:
        yield f"{name} is {value}, which is not a multiple of {of_name} = {of}; change one of them"


def _attention_problems(config: Config) -> Iterator[str]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.attention == "gqa":
        if groups is None:
            yield (
                "model.attention is gqa, which needs model.num_query_groups: give the number of "
                "key-value heads, or set model.attention to mha"
            )
        else:
            yield from _multiple(
                "model.num_attention_heads", heads, "model.num_query_groups", groups
            )
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
        if config.parallel.tensor > 1 and not _sequence(config):
            # Its down-projections are whole on every rank, and each rank's gradient of them only
            # knows its own heads; sequence parallelism is what sums them.
            yield (
                f"parallel.sequence is false with parallel.tensor = {config.parallel.tensor}; "
                "model.attention mla on more than one tensor-parallel rank needs "
                "parallel.sequence: true"
            )
        return
    yield from _multiple("model.hidden_size", model.hidden_size, "model.num_attention_heads", heads)
    if model.hidden_size % heads == 0 and model.hidden_size // heads % 2:
        yield (
            f"model.hidden_size / model.num_attention_heads is {model.hidden_size // heads}; "
            "rotary embeddings turn pairs, so make this head size even"
        )


def _expert_problems(config: Config) -> Iterator[str]:
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
    yield from _multiple("model.num_experts", model.num_experts, "parallel.expert", parallel.expert)
    yield from _grouped_product_problems(config)
    if parallel.tensor > 1 and not _sequence(config):
        # Without it every tensor-parallel rank would route the same tokens, and the experts'
        # gradients would be counted once for each of those ranks.
        yield (
            f"parallel.sequence is false with parallel.tensor = {parallel.tensor} and "
            f"model.num_experts = {model.num_experts}; a mixture of experts on more than one "
            "tensor-parallel rank needs parallel.sequence: true"
        )


def _grouped_product_problems(config: Config) -> Iterator[str]:
    """The grouped matrix product reads rows of whole 16 bytes."""
    precision, parts = config.train.precision, _expert_tensor(config)
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


def _gengram_problems(config: Config) -> Iterator[str]:
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
            "each size once and in rising order"
        )
    if gengram.window is not None and gengram.window < max(sizes):
        yield (
            f"model.gengram.window is {gengram.window}, too small for the {max(sizes)}-mers of "
            f"model.gengram.kmer_sizes; make it at least {max(sizes)}, or null for no window"
        )
    yield from _table_problems(config)
    if len(set(gengram.token_ids)) < len(gengram.token_ids):
        yield f"model.gengram.token_ids is {gengram.token_ids}; A C G T N need an id each"
    if max(gengram.token_ids) >= model.vocab_size:
        yield (
            f"model.gengram.token_ids is {gengram.token_ids}, but model.vocab_size is "
            f"{model.vocab_size}; ids go from 0 to {model.vocab_size - 1}"
        )


def _table_problems(config: Config) -> Iterator[str]:
    """What hashing and splitting by rows ask for."""
    gengram, parallel = config.model.gengram, config.parallel
    if max(gengram.kmer_sizes) > LARGEST_DIRECT:
        yield from _multiple(
            "model.gengram.dim", gengram.dim, "model.gengram.hashing.heads", gengram.hashing.heads
        )
        if gengram.dim % gengram.hashing.heads == 0:
            yield from _multiple(
                "model.gengram.dim / hashing.heads",
                gengram.dim // gengram.hashing.heads,
                "parallel.tensor",
                parallel.tensor,
            )
    try:
        kmer_tables(gengram)
    except ValueError:
        yield (
            f"model.gengram.hashing.rows is {gengram.hashing.rows}, below which there is no prime "
            "for each hashed table: raise it, or lower model.gengram.hashing.heads"
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
    if over == "expert" and _expert_tensor(config) != parallel.tensor:
        # Ranks that share experts would then hold different columns of the tables.
        yield (
            f"model.gengram.rows_over is expert, which needs parallel.expert_tensor = "
            f"parallel.tensor, but they are {_expert_tensor(config)} and {parallel.tensor}: set "
            "rows_over to data or tensor, or expert_tensor to null"
        )


def _split_problems(config: Config) -> Iterator[str]:
    """What tensor parallelism cuts into equal parts."""
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
        yield from _multiple(name, size, "parallel.tensor", tensor)
    if model.num_experts is not None:
        null = config.parallel.expert_tensor is None
        yield from _multiple(
            "model.ffn_hidden_size",
            model.ffn_hidden_size,
            "parallel.expert_tensor (null: parallel.tensor)" if null else "parallel.expert_tensor",
            _expert_tensor(config),
        )


def _pipeline_problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual == 1:
        yield "parallel.virtual_pipeline is 1, which means no interleaving; write null for that"
    elif virtual is not None and pipeline == 1:
        yield (
            f"parallel.virtual_pipeline is {virtual}, but parallel.pipeline is 1: set "
            "virtual_pipeline to null, or pipeline to 2 or more"
        )
    elif own := _stages_of_their_own(config):
        yield from _uneven_problems(config, own)
    else:
        yield from _multiple(
            "model.num_layers",
            config.model.num_layers,
            "parallel.pipeline * parallel.virtual_pipeline" if virtual else "parallel.pipeline",
            pipeline * (virtual or 1),
        )


def _stages_of_their_own(config: Config) -> dict[str, int]:
    """The keys that give a pipeline stage its number of layers, where they are set."""
    parallel = config.parallel
    layers = {
        "parallel.first_stage_layers": parallel.first_stage_layers,
        "parallel.last_stage_layers": parallel.last_stage_layers,
    }
    return {name: count for name, count in layers.items() if count is not None}


def _uneven_problems(config: Config, own: dict[str, int]) -> Iterator[str]:
    """The stages that no key is about must get as many layers each, in chunks of one size."""
    layers, pipeline = config.model.num_layers, config.parallel.pipeline
    virtual = config.parallel.virtual_pipeline
    if pipeline == 1:
        for name, count in own.items():
            yield (
                f"{name} is {count}, but parallel.pipeline is 1, so that one stage has all "
                "layers: set it to null, or pipeline to 2 or more"
            )
        return
    for name, count in own.items():
        yield from _multiple(name, count, "parallel.virtual_pipeline", virtual or 1)
    names, given, others = " + ".join(own), sum(own.values()), pipeline - len(own)
    rest = layers - given
    if others == 0 and rest:
        yield (
            f"{names} is {given}, but model.num_layers is {layers} and parallel.pipeline = 2 has "
            f"no other stage: set one of them to null, or make their sum {layers}"
        )
    elif others == 0 and virtual:
        # megatron-core 0.16.1 divides by the number of other stages.
        yield (
            f"{names} is {given} on parallel.pipeline = 2, where parallel.virtual_pipeline = "
            f"{virtual} allows only one of them: set the other to null, which places the same "
            "layers"
        )
    elif others and rest < 1:
        yield (
            f"{names} is {given}, which leaves none of model.num_layers = {layers} for the other "
            f"stages of parallel.pipeline = {pipeline}; lower it, or raise num_layers"
        )
    elif others:
        yield from _multiple(
            f"what {names} leaves of model.num_layers",
            rest,
            "the other stages" + (" * parallel.virtual_pipeline" if virtual else ""),
            others * (virtual or 1),
        )


def _sequence_problems(config: Config) -> Iterator[str]:
    parallel, length = config.parallel, config.model.seq_length
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence is true, but parallel.tensor is 1, so there is nothing to split: "
            "set sequence to null, or tensor to 2 or more"
        )
    factors = {}
    if parallel.context > 1:
        # Each rank takes one piece from the front and one from the back, to share causal work.
        factors["2 * parallel.context"] = 2 * parallel.context
    if _sequence(config):
        factors["parallel.tensor"] = parallel.tensor
    yield from _multiple(
        "model.seq_length", length, " * ".join(factors), math.prod(factors.values())
    )


def _installation_problems(config: Config) -> Iterator[str]:
    asked = config.model.implementation == "transformer_engine"
    if asked and importlib.util.find_spec("transformer_engine") is None:
        yield (
            "model.implementation is transformer_engine, which is not installed here: install "
            "transformer-engine[pytorch], or set model.implementation to torch"
        )


def _world_problems(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    copy, experts = _ranks_of_a_copy(config), _ranks_of_the_experts(config)
    if world_size % copy:
        yield (
            f"the world size is {world_size}, which is not a multiple of parallel.tensor * "
            f"pipeline * context = {parallel.tensor} * {parallel.pipeline} * {parallel.context} "
            f"= {copy}; start a multiple of {copy} processes, or lower one of these keys"
        )
    elif world_size % experts and config.model.num_experts is not None:
        yield (
            f"the world size is {world_size}, which is not a multiple of the experts' "
            f"parallel.expert_tensor * expert * pipeline = {_expert_tensor(config)} * "
            f"{parallel.expert} * {parallel.pipeline} = {experts}; start a multiple of {experts} "
            "processes, or lower one of these keys"
        )


def _batch_problems(config: Config, world_size: int) -> Iterator[str]:
    train, parallel = config.train, config.parallel
    if (train.steps is None) == (train.samples is None):
        what = "neither is given" if train.steps is None else "both are given"
        yield f"the length of the run is train.steps or train.samples, but {what}; give one"
    if train.samples is not None and train.samples < train.global_batch_size:
        yield (
            f"train.samples is {train.samples}, less than one step of train.global_batch_size = "
            f"{train.global_batch_size}; raise samples or lower the batch"
        )
    if world_size % _ranks_of_a_copy(config):
        return  # the data-parallel size is not known
    data = world_size // _ranks_of_a_copy(config)
    together = train.micro_batch_size * data
    if train.global_batch_size % together:
        yield (
            f"train.global_batch_size is {train.global_batch_size}, which is not a multiple of "
            f"train.micro_batch_size * data-parallel size = {train.micro_batch_size} * {data}; "
            "change the batch, or the number of processes"
        )
        return
    microbatches, virtual = train.global_batch_size // together, parallel.virtual_pipeline
    if virtual is not None and microbatches % parallel.pipeline:
        yield (
            f"with parallel.virtual_pipeline = {virtual} the microbatches of a step must be a "
            f"multiple of parallel.pipeline = {parallel.pipeline}, but train.global_batch_size / "
            f"(micro_batch_size * data-parallel size) is {microbatches}; change the batch"
        )


def _optimizer_problems(config: Config) -> Iterator[str]:
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
    if not optimizer.distributed and config.train.precision == "bf16" and pipeline > 1 and gengram:
        # A stage without memory has no tables, and megatron-core 0.16.1 cannot read the empty
        # parameter group back that it writes for them.
        yield (
            f"optimizer.distributed is false with train.precision bf16, parallel.pipeline = "
            f"{pipeline} and Gengram, whose checkpoints megatron-core might not read back: set "
            "distributed to true"
        )
    if optimizer.overlap_param_gather:
        for name in ("distributed", "overlap_grad_reduce"):
            if not getattr(optimizer, name):
                yield (
                    f"optimizer.overlap_param_gather needs optimizer.{name}, which is false; "
                    f"set {name} to true, or overlap_param_gather to false"
                )


def _checkpoint_problems(config: Config) -> Iterator[str]:
    interval, keep_every = config.checkpoint.interval, config.checkpoint.keep_every
    if keep_every and (interval is None or keep_every % interval):
        yield (
            f"checkpoint.keep_every is {keep_every}, which is no multiple of checkpoint.interval "
            f"({interval}): no checkpoint would stay for it"
        )
