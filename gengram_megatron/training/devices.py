"""Whether this machine can run a config, asked before processes meet."""

import os
from pathlib import Path

import torch

from gengram_megatron.config.problems.transformer_engine import TRANSFORMER_ENGINE, gpu_problems
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 1 << 20
"""Room for the semaphores of the processes that read samples and write checkpoints."""


def check_gpu(config: Config) -> None:
    """UserError: one line for each reason why not. Layers of torch run anywhere."""
    if config.model.implementation != TRANSFORMER_ENGINE:
        return
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if problems := list(gpu_problems(config, capability)):
        raise UserError("\n".join(problems))


def check_shared_memory() -> None:
    """UserError where the helper processes of a run could not be started. Checked first, because
    checkpoints would otherwise be lost only when the first one is written."""
    if not SHARED_MEMORY.is_dir():
        return
    facts = os.statvfs(SHARED_MEMORY)
    free = facts.f_bavail * facts.f_frsize
    if free < SHARED_MEMORY_BYTES:
        raise UserError(
            f"{SHARED_MEMORY} has {free:,} bytes free, and a run needs {SHARED_MEMORY_BYTES:,}: "
            "remove what other programs left there, or give the container more (docker run "
            "--shm-size=1g)"
        )
