"""Examines this machine with torch: its GPUs, the speed of a matrix product, and the bandwidth of
an all-reduce. Runs in a separate process, which prints the answer as JSON:
`python -m gengram_megatron.commands.doctor.machine devices`."""

import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 0.5
"""Duration of the measurement for each precision."""
LONG_ENOUGH = 0.01
"""Matrix sizes are doubled until a product takes this many seconds, so that launch overhead is
negligible. There is no fixed size because some CPUs multiply bf16 a hundred times slower than fp32.
"""
SMALLEST, LARGEST = 256, 16384
TIMES = 5
BYTES = {"gloo": 32 << 20, "nccl": 256 << 20}


def devices() -> dict[str, Any]:
    """Returns the CUDA and NCCL versions of torch, the GPUs with their memory in bytes, and the
    number of CPU threads."""
    cuda = torch.cuda.is_available()
    return {
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "threads": torch.get_num_threads(),
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def product() -> dict[str, Any]:
    """Measures the speed of a matrix product, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    speeds = {name: _tflops(dtype, device) for name, dtype in dtypes.items()}
    return {"device": device, "tflops": speeds}


def _tflops(dtype: torch.dtype, device: str) -> float:
    """Measures a product of square matrices, in 10^12 floating-point operations per second."""
    size = SMALLEST // 2
    took = 0.0
    while took < LONG_ENOUGH and size < LARGEST:
        size *= 2
        left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))
        _seconds_of_products(left, right, 1)  # warm-up: chooses and loads the kernel
        took = _seconds_of_products(left, right, 1)
    times = max(1, round(SECONDS / took))
    return 2 * size**3 * times / _seconds_of_products(left, right, times) / 1e12


def _seconds_of_products(left: torch.Tensor, right: torch.Tensor, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        torch.mm(left, right)
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def all_reduce(rank: str, of: str, meeting: str) -> dict[str, Any]:
    """Measures the bandwidth of an all-reduce, with nccl if every process has a GPU, or else with
    gloo between CPUs. Each of `of` processes calls it with its own `rank`.

    Args:
        meeting: a file that does not exist yet, by which the processes find each other.
    """
    index, size = int(rank), int(of)
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= size
    backend, device = ("nccl", f"cuda:{index}") if gpus else ("gloo", "cpu")
    if gpus:
        torch.cuda.set_device(index)
    store = dist.FileStore(meeting, size)
    dist.init_process_group(
        backend, store=store, rank=index, world_size=size, timeout=timedelta(seconds=60)
    )
    count = BYTES[backend] // 4
    numbers = torch.ones(count, device=device)
    dist.all_reduce(numbers)  # connects them
    if not (numbers == size).all():
        raise RuntimeError("the sum of an all-reduce is wrong")
    took = median(_seconds_of_all_reduce(numbers) for _ in range(TIMES))
    dist.destroy_process_group()
    # What each process has to send at least, whatever the algorithm.
    sent = 2 * (size - 1) / size * BYTES[backend]
    return {
        "backend": backend,
        "processes": size,
        "bytes": BYTES[backend],
        "seconds": took,
        "bytes_per_second": sent / took,
    }


def _seconds_of_all_reduce(numbers: torch.Tensor) -> float:
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(numbers)
    if numbers.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    questions: dict[str, Callable[..., dict[str, Any]]] = {
        "devices": devices,
        "product": product,
        "all_reduce": all_reduce,
    }
    print(json.dumps(questions[sys.argv[1]](*sys.argv[2:])))
