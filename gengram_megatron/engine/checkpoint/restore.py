"""Loading a checkpoint on all ranks: which checkpoints fit a config, which tensors are loaded, and
what an error on one rank means for all.

The tensors of a checkpoint have global names, so megatron-core finds each rank's parts of them
whatever layout wrote them. What else a checkpoint holds for the optimizer (how many optimizers, how
many parameter groups) is what its first rank had. A run has its own, with settings from its config,
and takes over only the number of steps that Adam has done.

Almost any error while reading means that the checkpoint cannot be used, and that the one before it
is tried. Three kinds of error say nothing about the checkpoint, and end the run: a UserError, which
is about the config; a lack of RAM, GPU memory or file handles; and a failed device or connection.
"""

import errno
import random
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import LARGEST_DIRECT
from gengram_megatron.config.tree import flattened, inline_yaml
from gengram_megatron.engine.processes import gather
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import UnreadableCheckpoint

Result = TypeVar("Result")
MACHINE_ERRORS = (
    MemoryError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
    dist.DistError,
)
RESOURCE_ERRNOS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class CannotLoad(Exception):
    """Raised on every rank when a checkpoint could not be read on at least one of them."""


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Runs an action on every rank, and raises an error on every rank if it fails on any. Returns
    the action's result.

    The error is CannotLoad if the cause is the checkpoint. Any other error is raised unchanged on
    the ranks where it occurred, and as a UserError on the others.
    """
    error: BaseException | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:
        error = caught
    causes = {} if error is None else _causes(error)
    failures: dict[int, tuple[bool, str]] = {}
    for rank_failures in gather({rank: _described(cause) for rank, cause in causes.items()}):
        failures |= rank_failures
    if error is not None and any(map(_unrelated_to_checkpoint, causes.values())):
        raise error
    for unrelated, message in failures.values():
        if unrelated:
            raise UserError(message)
    if failures:
        rank, (_, message) = min(failures.items())
        more = " and others" if len(failures) > 1 else ""
        raise CannotLoad(f"{message}, on rank {rank}{more}")
    return result


def _causes(error: BaseException) -> dict[int, BaseException]:
    """Returns the errors by rank: those that torch has collected from all ranks, or this rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        return {rank: cause for rank, (cause, _) in error.failures.items()}
    return {dist.get_rank(): error}


def _unrelated_to_checkpoint(error: BaseException) -> bool:
    if isinstance(error, UserError):
        return not isinstance(error, UnreadableCheckpoint)
    if not isinstance(error, Exception | CheckpointException):
        return True  # torch also collects BaseExceptions, such as KeyboardInterrupt
    if isinstance(error, OSError):
        return error.errno in RESOURCE_ERRNOS
    return isinstance(error, MACHINE_ERRORS) or CPU_ALLOCATOR in str(error)


def _described(error: BaseException) -> tuple[bool, str]:
    """Returns whether an error is unrelated to the checkpoint, and the error in one sentence."""
    if isinstance(error, UserError):
        message = str(error)
    else:  # only the first sentence: torch appends advice to programmers
        what = str(error).partition("\n")[0].partition(". ")[0]
        message = f"{type(error).__name__}: {what}" if what else type(error).__name__
    return _unrelated_to_checkpoint(error), message


CHANGEABLE_KEYS = {
    "model.init_std",
    "model.moe_aux_loss_coeff",
    "model.moe_z_loss_coeff",
    "model.implementation",
    "model.gengram.init",
    "model.gengram.init_std",
    "model.gengram.split",
    "model.gengram.rows_over",
    "model.gengram.project",
}
"""Keys of the model that may change: they determine neither which weights exist nor what the
weights mean."""
ADDED_KEYS = {"model.gengram.projection_bias": False}
"""Keys that older checkpoints lack, with the values that these were trained with. For other keys
that they lack, any value is accepted."""
CHANGEABLE_IN_NEW_RUN = {"model.seq_length", "model.rotary_base"}
"""Further keys that may change in a run which starts from another run's weights."""


def check_same_model(
    checkpoint: Path, stored: dict[str, Any], config: Config, new_run: bool
) -> None:
    """Raises UserError if the checkpoint's `model` section describes a different model from the
    config's.

    stored: the checkpoint's `model` section. new_run: whether its weights start a new run.
    """
    changeable = CHANGEABLE_KEYS | CHANGEABLE_IN_NEW_RUN if new_run else CHANGEABLE_KEYS
    alternative = "load another checkpoint" if new_run else "start in another run.dir"
    stored_settings = _settings(stored)
    for key, value in _settings(config.model.model_dump()).items():
        stored_value = stored_settings.get(key, ADDED_KEYS.get(key, value))
        if key not in changeable and stored_value != value:
            raise UserError(
                f"{checkpoint} was trained with {key} = {inline_yaml(stored_value)}, not "
                f"{inline_yaml(value)}: set {key} as it was, or {alternative}"
            )


def _settings(model: dict[str, Any]) -> dict[str, object]:
    """Returns the keys of a `model` section that have an effect, dotted, with their values."""
    model = {**model, "gengram": {**model["gengram"]}}
    gengram = model["gengram"]
    if not gengram["enabled"]:
        model["gengram"] = {"enabled": False}
    elif max(gengram["kmer_sizes"]) <= LARGEST_DIRECT:
        del gengram["hashing"]
    if model["attention"] != "mla":
        del model["mla"]
    return flattened({"model": model})


MASTER_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Key prefixes of master weights: with the distributed optimizer, and with the plain one in
bf16."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names of the two moments in torch's Adam."""
MOMENT_PREFIXES = {moment: f"optimizer.state.{moment}." for moment in MOMENTS}
"""Key prefix of each of Adam's moments."""
STEP_KEYS = ("step", "common_step")
RANK_KEYS = ("world_size", "tensor", "pipeline", "context", "expert", "expert_tensor")
"""The keys of a layout that determine which part of the model a rank has."""


def load_tensors(state: dict[Any, Any], path: Path) -> None:
    """Replaces the descriptions in a sharded state dict by what the checkpoint holds."""
    entries = [
        (container, key, value)
        for container, key, value in nested_items_iter(state)
        if isinstance(value, ShardedBase | LocalNonpersistentObject)
    ]
    sharded = {
        number: value
        for number, (*_, value) in enumerate(entries)
        if isinstance(value, ShardedBase)
    }
    loaded = dist_checkpointing.load({"wanted": sharded}, str(path)).get("wanted", {})
    for number, (container, key, value) in enumerate(entries):
        container[key] = loaded[number] if number in sharded else value.unwrap()


def without_extra_states(model: dict[str, Any]) -> dict[str, Any]:
    """Sets Transformer Engine's extra states in a model's sharded state dict to None, and returns
    the dict. They are empty except with FP8."""
    for container, key, value in list(nested_items_iter(model)):
        if isinstance(value, ShardedObject):
            container[key] = None
    return model


def sharded_names(path: Path) -> set[str]:
    """Returns the names of all sharded entries of a checkpoint."""
    return set(FileSystemReader(path).read_metadata().state_dict_metadata)


def master_prefix(stored: set[str]) -> str:
    """Returns the key prefix of master weights in a checkpoint, given the names of its sharded
    entries. It is empty in float32 without the distributed optimizer."""
    return next((m for m in MASTER_PREFIXES if any(name.startswith(m) for name in stored)), "")


def rename_masters(state: dict[str, Any], stored: set[str]) -> None:
    """Renames the master weights in an optimizer's sharded state dict as they are named in the
    checkpoint."""
    stored_prefix = master_prefix(stored)
    for container, key, value in list(nested_items_iter(state)):
        for prefix in MASTER_PREFIXES:
            if isinstance(value, ShardedBase) and value.key.startswith(prefix):
                container[key] = replace(value, key=stored_prefix + value.key.removeprefix(prefix))


def adam_steps(stored: dict[str, Any] | list[Any]) -> int:
    """Returns the number of steps that Adam has done, from the unsharded state of an optimizer of
    any kind."""
    return next(int(value) for _, key, value in nested_items_iter(stored) if key in STEP_KEYS)


def set_adam_steps(adam: torch.optim.Optimizer, steps: int) -> None:
    """Sets Adam's step counts. torch's Adam counts steps per parameter, Transformer Engine's per
    group."""
    if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
        for state in adam.state.values():
            state["step"] = torch.tensor(float(steps))
    else:
        for group in adam.param_groups:
            group["step"] = steps


def same_ranks(layout: dict[str, Any], other: dict[str, Any]) -> bool:
    """Returns whether each rank has the same part of the model in both layouts."""
    return all(layout[key] == other[key] for key in RANK_KEYS)


def random_states() -> ShardedObject:
    """Returns the states of all random number generators of this rank."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", states, (dist.get_world_size(),), (dist.get_rank(),))


def set_random_states(states: dict[str, Any]) -> None:
    """Restores the states of all random number generators of this rank."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def reseed(seed: int, step: int) -> None:
    """Seeds all random number generators from the run's seed and the step, for a rank whose layout
    differs from the checkpoint's, so that it has no states to restore. The step is included so that
    the numbers drawn before are not repeated."""
    digest = blake2b(f"{seed} {step}".encode(), digest_size=4).digest()
    step_seed = int.from_bytes(digest, "big")
    random.seed(step_seed)
    np.random.seed(step_seed)
    torch.manual_seed(step_seed)
    model_parallel_cuda_manual_seed(step_seed)
