"""What checkpoints cost: how long training stands still, and how fast they are written and read.

    python benchmarks/checkpoint.py [--hidden 512] [--layers 8] [--repeats 3] [--dir D] [--out F]
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py ...

A mixture-of-experts model with Gengram, its Adam states and the optimizer of a real run, saved and
loaded as training does it; --dir is where, a folder on the disk to measure. Each figure is the
median of --repeats.

- stall: seconds that training waits, asynchronously, and with checkpoint.asynchronous false
- copy: seconds to copy what a rank writes to the host's memory, and nothing else: an asynchronous
  save cannot stall training for less
- save: seconds until the files are flushed, have checksums and the checkpoint is the newest
- load: seconds until training may go on, checksums read and compared
- disk: bytes a second that one process writes and flushes there, for comparison
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from gengram_megatron.config.layout import check_layout, world_size_from_environment
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.processes import end_processes, start_processes
from gengram_megatron.runs.store import size


def config_of(arguments: argparse.Namespace, folder: str, asynchronous: bool) -> Config:
    """A model whose size is that of its experts and tables."""
    hidden = arguments.hidden
    return Config.model_validate(
        {
            "run": {"dir": folder},
            "model": {
                "hidden_size": hidden,
                "num_layers": arguments.layers,
                "num_attention_heads": hidden // 64,
                "num_query_groups": hidden // 128,
                "ffn_hidden_size": 2 * hidden,
                "num_experts": 8,
                "seq_length": 1024,
                "gengram": {"enabled": True, "layers": [2], "dim": hidden},
            },
            "data": {"path": "unused"},
            "train": {"global_batch_size": world_size_from_environment()[0], "steps": 100},
            "checkpoint": {"keep": 1, "asynchronous": asynchronous},
        }
    )


def make_state(config: Config):
    """All that a checkpoint holds, after a first step of Adam."""
    from gengram_megatron.engine.checkpoint.state import TrainingState
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.training.optimizer import build_optimizer, build_schedule

    layout = check_layout(config, dist.get_world_size())
    chunks = wrap_for_data_parallelism(build_model(config, layout), config, layout)
    optimizer = build_optimizer(config, chunks)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.step_if(lambda norm: True)
    schedule = build_schedule(config, layout, optimizer)
    return TrainingState(config, layout, chunks, optimizer, schedule, [])


def seconds(action: Callable[[], object]) -> float:
    """Of the slowest rank."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace, folder: str, asynchronous: bool) -> dict[str, float]:
    """Saves and loads of one kind; bytes, and seconds as medians."""
    state = make_state(config_of(arguments, folder, asynchronous))
    stalls, saves = [], []
    first = 1 if asynchronous else 1 + arguments.repeats
    for step in range(first, first + arguments.repeats):
        stall = seconds(lambda step=step: state.save(step, required=True))
        stalls.append(stall)
        saves.append(stall + seconds(state.wait))
    own = own_tensors(state)
    copies = [seconds(partial(copy_to_host, own)) for _ in range(arguments.repeats)]
    loads = [seconds(state.load_newest) for _ in range(arguments.repeats)]
    return {
        "bytes": size(state.store.newest()),
        "stall": statistics.median(stalls),
        "copy": statistics.median(copies),
        "save": statistics.median(saves),
        "load": statistics.median(loads),
    }


def own_tensors(state) -> list[torch.Tensor]:
    """What this rank writes to a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    parts = [part for part in nested_values(state.contents.state()) if type(part) is ShardedTensor]
    return [part.data for part in parts if is_main_replica(part.replica_id)]


def copy_to_host(tensors: list[torch.Tensor]) -> None:
    """Without a pause between them."""
    _ = [tensor.to("cpu", copy=True, non_blocking=True) for tensor in tensors]
    torch.cuda.synchronize()


def disk_speed(folder: str, amount: int = 2**28) -> float:
    """Bytes a second, written to one file and flushed."""
    content, path = os.urandom(2**24), Path(folder) / "disk_speed"
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(amount // len(content)):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    elapsed = time.perf_counter() - began
    path.unlink()
    return amount / elapsed


def show(results: dict[str, dict[str, float]], disk: float) -> None:
    """One table."""
    table = Table(title=f"the disk itself: {disk / 1e6:,.0f} MB/s")
    for heading in ("checkpoint", "MB", "stall s", "copy s", "save s", "MB/s", "load s", "MB/s"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right")
    for name, row in results.items():
        amount = row["bytes"] / 1e6
        cells = [f"{amount:,.0f}", f"{row['stall']:.2f}", f"{row['copy']:.2f}"]
        for key in ("save", "load"):
            cells += [f"{row[key]:.2f}", f"{amount / row[key]:,.0f}"]
        table.add_row(name, *cells)
    Console().print(table)


def main() -> None:
    """Both kinds, on the screen and in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="null: the system's folder for temporary files")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world, rank = world_size_from_environment()
    start_processes(check_layout(config_of(arguments, "unused", True), world), seed=1, rank=rank)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as own:
        folder = [own]
        dist.broadcast_object_list(folder)
        results = {
            name: measure(arguments, folder[0], asynchronous)
            for name, asynchronous in (("asynchronous", True), ("at once", False))
        }
        disk = disk_speed(own)
        dist.barrier()
    if rank == 0:
        show(results, disk)
        if arguments.out:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
            text = {"device": device, "ranks": world, "disk_bytes_per_second": disk, **results}
            arguments.out.write_text(json.dumps(text, indent=1) + "\n")
    end_processes()


if __name__ == "__main__":
    main()
