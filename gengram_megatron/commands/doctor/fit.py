"""What this machine means for a run: whether it fits (its processes, memory, and room for a
checkpoint), which implementation each part of the model gets and why not a faster one, and what is
missing here that would make training faster.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

from gengram_megatron.config.layout import Layout, Projection
from gengram_megatron.config.problems.engine import TRANSFORMER_ENGINE
from gengram_megatron.config.schema import Config, Gengram, Hashing, Model, Parallel
from gengram_megatron.launch.job import processes_of_a_node
from gengram_megatron.plan import plan
from gengram_megatron.plan.suggest import GB
from gengram_megatron.plan.time import Speed


def advice(found: dict, config: Config | None) -> Iterator[str]:
    """found: all that examine found out."""
    software, devices = found["software"], found["devices"]
    for name, one in software.items():
        if one["error"]:
            yield f"{name} is installed, but cannot be imported: mend it, or remove it"
    if devices is None:
        return
    if not devices["gpus"]:
        if devices["listed_by"] == "torch":
            yield _without_gpu(devices)
    else:
        yield from _missing(software)
    yield from _measured(found["measured"], devices, config)


def _without_gpu(devices: dict) -> str:
    there = any(Path("/proc/driver/nvidia/gpus").glob("*"))  # whether or not torch can use them
    if there and devices["cuda"] is None:
        return (
            "this machine has an NVIDIA GPU, but torch is built for the CPU: install a CUDA build"
        )
    if there:
        return "this machine has an NVIDIA GPU that torch cannot use: see nvidia-smi for its driver"
    return "there is no GPU, so all computes on the CPU: enough for the smoke runs only"


def _missing(software: dict) -> Iterator[str]:
    def lacks(name: str) -> bool:
        return software[name]["version"] is None

    if lacks("apex"):
        adam = ", and whose fused Adam megatron-core takes" if lacks("transformer-engine") else ""
        yield (
            "apex is missing, whose matrix products add gradients of weights to their sums"
            f"{adam}: build it with --cpp_ext and --cuda_ext"
        )
    if lacks("transformer-engine"):
        yield (
            "Transformer Engine is missing, with fused norms, attention, fp8 and Adam: pip install "
            "--no-build-isolation 'gengram-megatron[te]'"
        )
    if lacks("triton"):
        yield "Triton is missing, without which torch compiles nothing for GPUs: pip install triton"


def _measured(measured: dict | None, devices: dict, config: Config | None) -> Iterator[str]:
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
"""Why a model may lack a part."""


def explained(
    uses: dict[str, str | None],
    config: Config,
    projection: Projection | None,
    gpus: list,
    software: dict,
    extensions: dict,
) -> dict[str, dict]:
    """uses: what was built; each part's value here says that, and why."""
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


def _layers(config: Config, gpus: list, software: dict) -> str:
    chosen, found = config.model.implementation, software["transformer-engine"]
    asked = f"model.implementation is {chosen}"
    if chosen == TRANSFORMER_ENGINE:
        return asked
    if found["error"]:
        return f"{asked}; Transformer Engine cannot be imported: {found['error']}"
    if not gpus:
        return f"{asked}; Transformer Engine needs a GPU, and torch sees none"
    if found["version"] is None:
        return f"{asked}; Transformer Engine is not installed"
    return f"{asked}; Transformer Engine is used only where {TRANSFORMER_ENGINE} is asked for"


def _norm(looked: dict) -> str:
    if looked["found"] is None:
        return ""
    return f"; the fused norm of {looked['found']} is not used: it is no RMSNorm"


def _optimizer(config: Config, gpus: list, found: str) -> str:
    if config.train.engine == "deepspeed":
        return "train.engine is deepspeed, which shares what torch's Adam works on"
    if found != "torch":
        return f"megatron-core takes the fused Adam of {found} where it is installed"
    missing = "megatron-core found no fused Adam, of Transformer Engine or apex"
    return missing if gpus else f"{missing}; both need a GPU"


def _fusion(gpus: list, config: Config, apex: str | None) -> str:
    if not gpus:
        return "apex and Transformer Engine add up gradients inside matrix products, on GPUs"
    found = f"megatron-core found apex's {apex}" if apex else "megatron-core found none of apex"
    if config.model.implementation == TRANSFORMER_ENGINE:
        return f"{found}; Transformer Engine's layers have their own"
    return found


def _fp8(config: Config) -> str:
    return f"train.precision is {config.train.precision}"


HIDDEN, HEADS, LENGTH, EXPERTS = 64, 4, 32, 2


def sample(config: Config, projection: Projection | None) -> Config:
    """One layer of it, on one process, with narrow weights.

    All that decides which implementation a part gets stays: kind of attention, experts or none,
    precision, optimizer, implementation. projection: of the whole run; None: it has no memory.
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
            "gengram": _memory(model.gengram, projection),
        }
    )


def _memory(gengram: Gengram, projection: Projection | None) -> Gengram:
    if projection is None:
        return gengram
    return gengram.model_copy(
        update={
            "layers": [1],
            "kmer_sizes": [1, 2],
            "hashing": Hashing(),
            "window": gengram.window and min(gengram.window, LENGTH),
            "dim": HIDDEN,
            "project": projection.of,
            "split": "columns",
            "rows_over": None,
        }
    )


def planned(config: Config, layout: Layout, on_gpu: bool) -> dict:
    """What gengram plan says, without its judgement of the memory: that is made here."""
    return plan(config, layout, Speed(), gigabytes=float("inf"), on_gpu=on_gpu)


def memory_problems(config: Config, rank: int, gpus: list[dict]) -> Iterator[str]:
    """rank: bytes that the fullest rank needs, as planned."""
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
    """Bytes that are free in the run's folder, and those of one checkpoint."""
    if free < checkpoint:
        yield (
            f"one checkpoint needs about {checkpoint / GB:.1f} GB, and run.dir has "
            f"{free / GB:.1f} GB free: make room, or give another run.dir"
        )
