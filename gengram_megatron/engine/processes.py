"""The processes of a run: whether this machine can run its config, and their process groups."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch.distributed.rendezvous import rendezvous

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.problems.engine import TRANSFORMER_ENGINE, gpu_problems
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError

TIMEOUT = timedelta(minutes=30)
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


def start_processes(layout: Layout, seed: int, rank: int, deterministic: bool = True) -> None:
    """Join the other processes and make megatron-core's groups for the layout."""
    if deterministic:
        _compute_deterministically()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))
    if not dist.is_initialized():
        dist.init_process_group(
            backend="nccl" if torch.cuda.is_available() else "gloo",
            store=_store(layout.world_size, rank),
            world_size=layout.world_size,
            rank=rank,
            timeout=TIMEOUT,
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed)
    # What the layers report is kept in a global, which must not outlive a run of this process.
    get_moe_layer_wise_logging_tracker().clear()


def _store(world_size: int, rank: int) -> dist.Store | None:
    """Where the processes find each other; None: where torch looks by itself."""
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt == 0:
        return None
    # torchrun's store outlives a restart, and with it the addresses of the processes that died.
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    return dist.PrefixStore(f"attempt_{attempt}", store)


def _compute_deterministically() -> None:
    """The same bits every time on GPUs, too; on the CPU they are so anyway."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs, and changes nothing


def gather(own: Any) -> list:
    """What every rank has, on every rank, in the order of the ranks."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def end_processes() -> None:
    """Leave the groups. Safe where none were made."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
