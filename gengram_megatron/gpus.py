"""Lists the NVIDIA GPUs of this machine without torch, whose import takes seconds."""

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
"""Time limit for nvidia-smi, which never answers if a driver hangs."""


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, memory in bytes, and compute capability, such as 9.0."""

    name: str
    bytes: int
    compute_capability: str


def nvidia_gpus() -> list[Gpu]:
    """Returns the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows; empty if nvidia-smi
    gives no answer."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return []
    try:
        done = subprocess.run(
            NVIDIA_SMI, capture_output=True, text=True, timeout=SECONDS, check=True
        )
        gpus = [_gpu(line) for line in done.stdout.splitlines()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []  # the driver does not work
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpus if visible is None else _visible(gpus, visible)


def _gpu(line: str) -> Gpu:
    name, mebibytes, capability = (cell.strip() for cell in line.rsplit(",", 2))
    float(capability)  # raises ValueError if nvidia-smi prints [N/A]
    return Gpu(name, int(mebibytes) << 20, capability)


def _visible(gpus: list[Gpu], names: str) -> list[Gpu]:
    """Returns the GPUs with the listed numbers. If names are not numbers, returns as many GPUs as
    there are names."""
    chosen = [name.strip() for name in names.split(",") if name.strip() not in ("", "-1")]
    if all(name.isdecimal() for name in chosen):
        return [gpus[int(name)] for name in chosen if int(name) < len(gpus)]
    return gpus[: len(chosen)]
