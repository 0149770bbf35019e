"""Estimates what a run needs from its config alone: nothing is started, and no GPU is needed.

stages: layers and weights of each rank; activations and memory: bytes on the rank that needs most;
communication: bytes that a rank sends; time: how long it takes; suggest: layouts that fit.
"""

from dataclasses import asdict
from typing import Any

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import Placement
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.plan.communication import most_sent
from gengram_megatron.plan.memory import peak_rank
from gengram_megatron.plan.stages import ShardedModel
from gengram_megatron.plan.suggest import warnings
from gengram_megatron.plan.time import Speed, forward_flops, seconds_of_run, training_flops


def plan(
    config: Config, layout: Layout, speed: Speed, gigabytes: float, on_gpu: bool = True
) -> dict[str, Any]:
    """Returns all figures of a run, as `gengram plan --json` prints them.

    A table's rows_per_rank and columns_per_rank, and memory, are those of the rank that holds
    most; communication is that of the rank that sends most.

    Args:
        gigabytes: memory of one GPU.
        on_gpu: False for a run on CPUs, which may project its tables instead of its features.
    """
    sharded = ShardedModel(config, layout, on_gpu)
    memory, sent = peak_rank(sharded), most_sent(sharded)
    tokens_per_step = config.train.global_batch_size * config.model.seq_length
    seconds = seconds_of_run(sharded, speed)
    return {
        "processes": layout.world_size,
        "steps": layout.steps,
        "samples": config.train.samples or layout.samples,
        "samples_trained": layout.samples,
        "tokens": layout.samples * config.model.seq_length,
        "parameters": asdict(count_parameters(config)),
        "parameters_per_rank": sharded.rank_parameters(memory.stage).total,
        "forward_flops_per_token": forward_flops(config).total,
        "flops_per_token": training_flops(config),
        "flops_per_step": training_flops(config) * tokens_per_step,
        "memory_bytes_per_rank": {**asdict(memory), "total": memory.total},
        "bytes_sent_per_rank_and_step": {**asdict(sent), "total": sent.total},
        "utilisation": speed.utilisation,
        "gpu_tflops": speed.tflops,
        "seconds_per_step": seconds / layout.steps,
        "hours": seconds / 3600,
        "gpu_hours": seconds / 3600 * layout.world_size,
        "memory_layers": config.model.gengram.layers if config.model.gengram.enabled else [],
        "projection": _projection(sharded),
        "tables": [_table(placement, sharded) for placement in layout.placements],
        "warnings": list(warnings(sharded, memory, gigabytes)),
    }


def _projection(sharded: ShardedModel) -> dict[str, str] | None:
    projection = sharded.projection
    return projection and {"of": projection.input, "reason": projection.reason}


def _table(placement: Placement, sharded: ShardedModel) -> dict[str, Any]:
    table = placement.table
    return {
        "name": table.name,
        "k": table.k,
        "hashed": table.hash_seed is not None,
        "rows": table.rows,
        "columns": table.columns,
        "split": placement.split,
        "over": placement.rows_over or "tensor",
        "rows_per_rank": sharded.table_rows_held(placement),
        "columns_per_rank": placement.columns_held(sharded.layout.tensor),
        "reason": placement.reason,
    }
