"""Asked as two processes: the bandwidth of an all-reduce between them."""

import json
import sys
import time
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

TIMES = 5
BYTES = {"gloo": 32 << 20, "nccl": 256 << 20}


def measure(rank: int, size: int, meeting: str) -> dict:
    """nccl where every process has a GPU, or else gloo between CPUs.

    meeting: a file that is not there yet, by which the processes find each other.
    """
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= size
    backend, device = ("nccl", f"cuda:{rank}") if gpus else ("gloo", "cpu")
    if gpus:
        torch.cuda.set_device(rank)
    store = dist.FileStore(meeting, size)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    count = BYTES[backend] // 4
    numbers = torch.ones(count, device=device)
    dist.all_reduce(numbers)  # connects them
    if not (numbers == size).all():
        raise RuntimeError("the sum of an all-reduce is wrong")
    took = median(_seconds(numbers) for _ in range(TIMES))
    dist.destroy_process_group()
    # What each process has to send of it, whatever the algorithm.
    sent = 2 * (size - 1) / size * BYTES[backend]
    return {
        "backend": backend,
        "processes": size,
        "bytes": BYTES[backend],
        "seconds": took,
        "bytes_per_second": sent / took,
    }


def _seconds(numbers: torch.Tensor) -> float:
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(numbers)
    if numbers.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    rank, size, meeting = sys.argv[1:]
    print(json.dumps(measure(int(rank), int(size), meeting)))
