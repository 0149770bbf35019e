"""The share of a step that waits for samples."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from gengram_megatron.engine.platform import cpu
from gengram_megatron.engine.training.waiting import Waiting

READING = (0.02, 0.1)  # seconds a microbatch, of each rank


def slow_reader(seconds: float):
    while True:
        time.sleep(seconds)
        yield torch.zeros(1)


def measure(rank: int, folder: str) -> None:
    """Three microbatches, with work in between that is no waiting; then none."""
    if not torch.cuda.is_available():
        cpu.stand_in_for_cuda()
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    waiting = Waiting(slow_reader(READING[rank]))
    for _ in range(3):
        next(waiting)
        time.sleep(0.5)
    (Path(folder) / str(rank)).write_text(f"{waiting.take()} {waiting.take()}")
    dist.destroy_process_group()


def test_a_step_has_waited_as_long_as_its_slowest_rank(tmp_path):
    processes.spawn(measure, (str(tmp_path),), nprocs=2)
    waited = [[float(word) for word in (tmp_path / rank).read_text().split()] for rank in "01"]
    assert waited[0] == waited[1]
    assert 3 * READING[1] <= waited[0][0] < 1.5  # the work takes that long
    assert waited[0][1] == 0
