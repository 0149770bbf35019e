"""Asked as a process: what torch sees of this machine."""

import json

import torch


def devices() -> dict:
    """Versions that torch was built with, GPUs with their memory in bytes, and CPU threads."""
    cuda = torch.cuda.is_available()
    return {
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "threads": torch.get_num_threads(),
    }


def _gpu(index: int) -> dict:
    seen = torch.cuda.get_device_properties(index)
    return {
        "name": seen.name,
        "bytes": seen.total_memory,
        "compute_capability": f"{seen.major}.{seen.minor}",
    }


if __name__ == "__main__":
    print(json.dumps(devices()))
