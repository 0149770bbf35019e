"""How a run fits on this machine: whether processes, memory and room for a checkpoint suffice,
which implementation each part of the model uses and why not a faster one, and what would make
training faster.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from gengram_megatron.commands.doctor.ask import Findings
from gengram_megatron.config.layout import Layout, Projection
from gengram_megatron.config.problems.engine import TRANSFORMER_ENGINE
from gengram_megatron.config.schema import Config, Gengram, Hashing, Model, Parallel
from gengram_megatron.launch.job import processes_of_a_node
from gengram_megatron.plan import plan
from gengram_megatron.plan.suggest import GB
from gengram_megatron.plan.time import Speed


def advice(found: dict[str, Any], config: Config | None) -> Iterator[str]:
    """Yields advice on what to install or change to train faster.

    Args:
        found: the results of `examine`.
    """
    software, devices = found["software"], found["devices"]
    for name, package in software.items():
        if package["error"]:
            yield f"{name} is installed, but cannot be imported: repair or remove it"
    if devices is None:
        return
    if not devices["gpus"]:
        if devices["listed_by"] == "torch":
            yield _without_gpu(devices)
    else:
        yield from _missing(software)
    yield from _measured(found["measured"], devices, config)


def _without_gpu(devices: dict[str, Any]) -> str:
    has_gpu = any(Path("/proc/driver/nvidia/gpus").glob("*"))  # whether or not torch can use it
    if has_gpu and devices["cuda"] is None:
        return (
            "this machine has an NVIDIA GPU, but torch is built for the CPU: install a CUDA build"
        )
    if has_gpu:
        return "this machine has an NVIDIA GPU that torch cannot use: see nvidia-smi for its driver"
    return "there is no GPU, so everything computes on the CPU: only enough for the smoke runs"


def _missing(software: Findings) -> Iterator[str]:
    def lacks(name: str) -> bool:
        return software[name]["version"] is None

    if lacks("apex"):
        adam = ", and whose fused Adam megatron-core uses" if lacks("transformer-engine") else ""
        yield (
            "apex is missing, whose matrix products accumulate weight gradients directly"
            f"{adam}: build it with --cpp_ext and --cuda_ext"
        )
    if lacks("transformer-engine"):
        yield (
            "Transformer Engine is missing, which has fused norms, attention, fp8 and Adam: pip "
            "install --no-build-isolation 'gengram-megatron[te]'"
        )
    if lacks("triton"):
        yield "Triton is missing, without which torch cannot compile for GPUs: pip install triton"


def _measured(
    measured: dict[str, Any] | None, devices: dict[str, Any], config: Config | None
) -> Iterator[str]:
    product = measured and measured["matrix_product"]
    if not product or config is None or config.train.dtype != "bf16":
        return
    bf16, fp32 = product["tflops"]["bf16"], product["tflops"]["fp32"]
    if fp32 > bf16 and not devices["gpus"]:
        yield f"train.precision=fp32 computes {fp32 / bf16:.1f} times as fast here as bf16"


WITHOUT = {
    "experts": "model.num_experts is null: a dense model",
    "memory": "model.gengram.enabled is false",
}
"""Reasons why a model may lack a part."""


def explained(
    uses: dict[str, str | None],
    config: Config,
    projection: Projection | None,
    gpus: list[dict[str, Any]],
    software: Findings,
    extensions: Findings,
) -> Findings:
    """Returns for each part of the model which implementation it uses, and why.

    Args:
        uses: the implementation of each part that was built; None if the model lacks the part.
    """
    layers = _layers(config, gpus, software)
    why = {
        "attention": layers,
        "norm": layers + _norm(extensions["layer norm"]),
        "linear": layers,
        "experts": layers,
        "memory": projection and projection.reason,
        "optimizer": _optimizer(config, gpus, extensions["Adam"]["found"]),
        "gradient accumulation fusion": _fusion(
            gpus, config, extensions["gradient accumulation fusion"]["found"]
        ),
        "fp8": _fp8(config),
    }
    return {
        part: {"uses": text or "none", "why": why[part] if text else WITHOUT[part]}
        for part, text in uses.items()
    }


def _layers(config: Config, gpus: list[dict[str, Any]], software: Findings) -> str:
    implementation, package = config.model.implementation, software["transformer-engine"]
    setting = f"model.implementation is {implementation}"
    if implementation == TRANSFORMER_ENGINE:
        return setting
    if package["error"]:
        return f"{setting}; Transformer Engine cannot be imported: {package['error']}"
    if not gpus:
        return f"{setting}; Transformer Engine needs a GPU, and torch sees none"
    if package["version"] is None:
        return f"{setting}; Transformer Engine is not installed"
    return f"{setting}; Transformer Engine is used only if set to {TRANSFORMER_ENGINE}"


def _norm(extension: dict[str, str | None]) -> str:
    if extension["found"] is None:
        return ""
    return f"; the fused norm of {extension['found']} is not used: it is not an RMSNorm"


def _optimizer(config: Config, gpus: list[dict[str, Any]], found: str | None) -> str:
    if config.train.engine == "deepspeed":
        return "train.engine is deepspeed, which shards what torch's Adam works on"
    if found != "torch":
        return f"megatron-core uses the fused Adam of {found} if it is installed"
    missing = "megatron-core found no fused Adam, of Transformer Engine or apex"
    return missing if gpus else f"{missing}; both need a GPU"


def _fusion(gpus: list[dict[str, Any]], config: Config, apex: str | None) -> str:
    if not gpus:
        return "apex and Transformer Engine accumulate gradients in matrix products only on GPUs"
    reason = f"megatron-core found apex's {apex}" if apex else "megatron-core found none in apex"
    if config.model.implementation == TRANSFORMER_ENGINE:
        return f"{reason}; Transformer Engine's layers have their own"
    return reason


def _fp8(config: Config) -> str:
    return f"train.precision is {config.train.precision}"


HIDDEN, HEADS, LENGTH, EXPERTS = 64, 4, 32, 2


def sample(config: Config, projection: Projection | None) -> Config:
    """Returns a config with one narrow layer, for one step on one process.

    It keeps everything that decides which implementation a part uses: kind of attention, experts or
    not, precision, optimizer, implementation.

    Args:
        projection: that of the whole run; None without Gengram.
    """
    one_step = {"global_batch_size": 1, "micro_batch_size": 1, "steps": 1, "samples": None}
    return config.model_copy(
        update={
            "model": _model(config.model, projection),
            "parallel": Parallel(),
            "train": config.train.model_copy(update=one_step),
        }
    )


def _model(model: Model, projection: Projection | None) -> Model:
    dense = model.num_experts is None
    return model.model_copy(
        update={
            "hidden_size": HIDDEN,
            "num_layers": 1,
            "num_attention_heads": HEADS,
            "num_query_groups": HEADS // 2 if model.attention == "gqa" else None,
            "ffn_hidden_size": HIDDEN,
            "num_experts": None if dense else EXPERTS,
            "moe_router_topk": min(model.moe_router_topk, EXPERTS),
            "seq_length": LENGTH,
            "gengram": _gengram(model.gengram, projection),
        }
    )


def _gengram(gengram: Gengram, projection: Projection | None) -> Gengram:
    if projection is None:
        return gengram
    return gengram.model_copy(
        update={
            "layers": [1],
            "kmer_sizes": [1, 2],
            "hashing": Hashing(),
            "window": gengram.window and min(gengram.window, LENGTH),
            "dim": HIDDEN,
            "project": projection.input,
            "split": "columns",
            "rows_over": None,
        }
    )


def planned(config: Config, layout: Layout, on_gpu: bool) -> dict[str, Any]:
    """Returns the figures of `gengram plan`, without its warning about memory, because
    memory_problems compares it with this machine's."""
    return plan(config, layout, Speed(), gigabytes=float("inf"), on_gpu=on_gpu)


def memory_problems(config: Config, rank: int, gpus: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a sentence for each reason why the run does not fit into this machine's memory or on
    its GPUs.

    Args:
        rank: estimated bytes on the rank that needs most.
    """
    processes = processes_of_a_node(config.launch, len(gpus))
    if not gpus:
        here = psutil.virtual_memory().total
        if rank * processes > here:
            yield (
                f"{processes} processes need about {rank / GB:.1f} GB each, and this machine has "
                f"{here / GB:.1f} GB of memory: make the model or the batch smaller"
            )
        return
    if processes > len(gpus):
        yield (
            f"launch.processes is {processes}, one for each GPU of a node, but here "
            f"there are {len(gpus)}; lower it, and change the layout with it"
        )
    smallest = min(gpus, key=lambda gpu: gpu["bytes"])
    if rank > smallest["bytes"]:
        yield (
            f"a rank needs about {rank / GB:.1f} GB, and {smallest['name']} has "
            f"{smallest['bytes'] / GB:.1f} GB: recompute more (train.recompute), split further, or "
            "see gengram plan --suggest"
        )


def room_problems(free: int, checkpoint: int) -> Iterator[str]:
    """Yields a sentence if the free bytes in the run's folder are fewer than a checkpoint needs."""
    if free < checkpoint:
        yield (
            f"one checkpoint needs about {checkpoint / GB:.1f} GB, and run.dir has "
            f"{free / GB:.1f} GB free: make room, or give another run.dir"
        )
