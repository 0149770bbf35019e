"""The processes of a run: checks that this machine can run the config, and process groups."""

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
"""Space for the semaphores of the processes that read samples and write checkpoints."""


def check_gpu(config: Config) -> None:
    """Raises UserError, with one line per reason, if Transformer Engine's layers cannot run on this
    machine. Layers of torch run anywhere."""
    if config.model.implementation != TRANSFORMER_ENGINE:
        return
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if problems := list(gpu_problems(config, capability)):
        raise UserError("\n".join(problems))


def check_shared_memory() -> None:
    """Raises UserError if there is too little shared memory to start the helper processes of a run.
    This is checked at the start, as it would otherwise show only when the first checkpoint is
    written."""
    if not SHARED_MEMORY.is_dir():
        return
    stats = os.statvfs(SHARED_MEMORY)
    free = stats.f_bavail * stats.f_frsize
    if free < SHARED_MEMORY_BYTES:
        raise UserError(
            f"{SHARED_MEMORY} has {free:,} bytes free, and a run needs {SHARED_MEMORY_BYTES:,}: "
            "remove files that other programs left there, or give the container more (docker run "
            "--shm-size=1g)"
        )


def start_processes(layout: Layout, seed: int, rank: int, deterministic: bool = True) -> None:
    """Joins the other processes and creates megatron-core's process groups for the layout."""
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
    create_groups(layout, seed)
    # megatron-core keeps what MoE layers report in a global; clear what an earlier run left in it.
    get_moe_layer_wise_logging_tracker().clear()


def create_groups(layout: Layout, seed: int, **settings: Any) -> None:
    """Creates megatron-core's process groups for the layout, and seeds its random numbers.

    settings: further arguments of megatron-core's initialize_model_parallel.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        **settings,
    )
    model_parallel_cuda_manual_seed(seed)


def _store(world_size: int, rank: int) -> dist.Store | None:
    """Returns the store through which the processes find each other, or None for torch's
    default."""
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt == 0:
        return None
    # torchrun's store survives a restart, and still holds the addresses of the dead processes.
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    return dist.PrefixStore(f"attempt_{attempt}", store)


def _compute_deterministically() -> None:
    """Makes results on GPUs the same to the bit in every run; on the CPU they always are."""
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        # It costs time for nothing. (torch adds the attribute where mypy does not see it.)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def gather(value: Any) -> list[Any]:
    """Returns every rank's value, on every rank, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def end_processes() -> None:
    """Destroys the process groups, if there are any."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
