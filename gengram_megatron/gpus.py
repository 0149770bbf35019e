"""NVIDIA GPUs of this machine without torch, whose import takes seconds."""

import os
import shutil
import subprocess
from dataclasses import dataclass

NVIDIA_SMI = [
    "nvidia-smi",
    "--query-gpu=name,memory.total,compute_cap",
    "--format=csv,noheader,nounits",
]
SECONDS = 2
"""nvidia-smi never answers where a driver hangs."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, memory in bytes, and compute capability, such as 9.0."""

    name: str
    bytes: int
    compute_capability: str


def nvidia_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves; none without an answer."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return []
    try:
        done = subprocess.run(
            NVIDIA_SMI, capture_output=True, text=True, timeout=SECONDS, check=True
        )
        found = [_gpu(line) for line in done.stdout.splitlines()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []  # a driver that does not work
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else _visible(found, visible)


def _gpu(line: str) -> Gpu:
    name, mebibytes, capability = (cell.strip() for cell in line.rsplit(",", 2))
    float(capability)  # a ValueError where the tool says [N/A]
    return Gpu(name, int(mebibytes) << 20, capability)


def _visible(found: list[Gpu], names: str) -> list[Gpu]:
    """The GPUs that a list of numbers leaves; of other names only their count is heeded."""
    chosen = [name.strip() for name in names.split(",") if name.strip() not in ("", "-1")]
    if all(name.isdecimal() for name in chosen):
        return [found[int(name)] for name in chosen if int(name) < len(found)]
    return found[: len(chosen)]
