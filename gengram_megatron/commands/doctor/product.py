"""Asked as a process: the speed of a matrix product, on the GPU where there is one."""

import json
import time

import torch

SECONDS = 0.5
"""Of measuring, for each precision."""
LONG_ENOUGH = 0.01
"""Seconds that a product takes at least, so that its start does not count: sizes are doubled until
then. Some CPUs multiply bf16 a hundred times slower than fp32."""
SMALLEST, LARGEST = 256, 16384


def tflops(dtype: torch.dtype, device: str) -> float:
    """10^12 floating-point operations a second of a product of square matrices."""
    size = SMALLEST // 2
    took = 0.0
    while took < LONG_ENOUGH and size < LARGEST:
        size *= 2
        left, right = (torch.randn(size, size).to(device, dtype) for _ in range(2))
        _seconds(left, right, 1)  # the first one chooses and loads its kernel
        took = _seconds(left, right, 1)
    times = max(1, round(SECONDS / took))
    return 2 * size**3 * times / _seconds(left, right, times) / 1e12


def _seconds(left: torch.Tensor, right: torch.Tensor, times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        torch.mm(left, right)
    if left.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds = {"bf16": tflops(torch.bfloat16, device), "fp32": tflops(torch.float32, device)}
    print(json.dumps({"device": device, "tflops": speeds}))
