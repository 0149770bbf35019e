"""Whether a run fits on this machine: its processes, memory, and room for a checkpoint."""

from collections.abc import Iterator

import psutil

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.launch.job import processes_of_a_node
from gengram_megatron.plan import plan
from gengram_megatron.plan.time import Speed
from gengram_megatron.plan.warnings import GB


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
