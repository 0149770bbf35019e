"""Loading a checkpoint on all ranks: whose weights, which tensors, and what an error on one rank
means for all.

Tensors of a checkpoint have global names, so megatron-core finds each rank's parts of them whatever
layout wrote it. What else a checkpoint holds of the optimizer is what its first rank had: so many
optimizers, so many groups of parameters. A run has its own, with settings from its config, and
takes over only how many steps Adam has done.

An error in reading says that the checkpoint is of no use, whatever it is: the one before may be.
Three kinds of error say nothing of the checkpoint, and end the run: a UserError, which is about the
config; want of memory or of file handles; and a device or a connection that failed.
"""

import errno
import random
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

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
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import LARGEST_DIRECT
from gengram_megatron.config.tree import flattened, inline_yaml
from gengram_megatron.engine.processes import gather
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import UnreadableCheckpoint, checkpoints_at

Result = TypeVar("Result")
OF_THE_MACHINE = (
    MemoryError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
    dist.DistError,
)
NO_RESOURCES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


class CannotLoad(Exception):
    """A checkpoint that no rank can use, because it could not be read on one of them."""


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Do something on every rank, and raise an error on every rank if it fails on any.

    That is CannotLoad where the error is the checkpoint's. Any other goes on as it is on the ranks
    that have it, and is told as a UserError on those that do not.
    """
    result = error = None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:
        error = caught
    causes = {} if error is None else _causes(error)
    failures: dict[int, tuple[bool, str]] = {}
    for own in gather({rank: _described(cause) for rank, cause in causes.items()}):
        failures |= own
    if any(map(_is_of_something_else, causes.values())):
        raise error
    for of_something_else, words in failures.values():
        if of_something_else:
            raise UserError(words)
    if failures:
        rank, (_, words) = min(failures.items())
        others = " and others" if len(failures) > 1 else ""
        raise CannotLoad(f"{words}, on rank {rank}{others}")
    return result


def _causes(error: BaseException) -> dict[int, BaseException]:
    """The errors by rank that torch has collected from all of them, or this rank's own."""
    if isinstance(error, CheckpointException) and error.failures:
        return {rank: cause for rank, (cause, _) in error.failures.items()}
    return {dist.get_rank(): error}


def _is_of_something_else(error: BaseException) -> bool:
    if isinstance(error, UserError):
        return not isinstance(error, UnreadableCheckpoint)
    if not isinstance(error, Exception | CheckpointException):
        return True  # torch collects requests to stop as well
    if isinstance(error, OSError):
        return error.errno in NO_RESOURCES
    return isinstance(error, OF_THE_MACHINE) or CPU_ALLOCATOR in str(error)


def _described(error: BaseException) -> tuple[bool, str]:
    """Whether an error says nothing of the checkpoint, and the error in one sentence."""
    if isinstance(error, UserError):
        words = str(error)
    else:  # torch goes on with advice to programmers
        what = str(error).partition("\n")[0].partition(". ")[0]
        words = f"{type(error).__name__}: {what}" if what else type(error).__name__
    return _is_of_something_else(error), words


FREE = {
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
"""Keys of the model that may change: they decide neither which weights there are nor what these
mean."""
ADDED = {"model.gengram.projection_bias": False}
"""Keys that older checkpoints lack, and what these were trained with. Of other keys that they lack,
any value fits."""
FREE_TO_A_NEW_RUN = {"model.seq_length", "model.rotary_base"}
"""And those that a run which begins with another's weights may have otherwise."""


def origins(config: Config) -> list[Path]:
    """The checkpoints that checkpoint.load means, in the order of their steps: the one that it
    names, or all of a run's folder."""
    given = Path(config.checkpoint.load)
    if found := checkpoints_at(given):
        return found
    raise UserError(
        f"checkpoint.load is {given}, which is neither a checkpoint nor the folder of a run that "
        "has one: give a folder such as runs/mine or runs/mine/checkpoints/step_00001000; "
        "`gengram checkpoint import` makes one from a published model"
    )


def check_same_model(checkpoint: Path, stored: dict, config: Config, new_run: bool) -> None:
    """UserError: the checkpoint's `model` section describes another model than the config's.

    new_run: whether it is another run's, whose weights are loaded.
    """
    free = FREE | FREE_TO_A_NEW_RUN if new_run else FREE
    otherwise = "load another checkpoint" if new_run else "start in another run.dir"
    theirs = _settings(stored)
    for key, own in _settings(config.model.model_dump()).items():
        other = theirs.get(key, ADDED.get(key, own))
        if key not in free and other != own:
            raise UserError(
                f"{checkpoint} was trained with {key} = {inline_yaml(other)}, not "
                f"{inline_yaml(own)}: set {key} as it was, or {otherwise}"
            )


def _settings(model: dict) -> dict[str, object]:
    """All keys of a `model` section that are read, dotted."""
    model = {**model, "gengram": {**model["gengram"]}}
    gengram = model["gengram"]
    if not gengram["enabled"]:
        model["gengram"] = {"enabled": False}
    elif max(gengram["kmer_sizes"]) <= LARGEST_DIRECT:
        del gengram["hashing"]
    if model["attention"] != "mla":
        del model["mla"]
    return flattened({"model": model})


MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Of master weights: the distributed optimizer calls them so, and the plain one in bf16."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What torch's Adam calls the moments that it keeps."""
MOMENT_NAMES = {moment: f"optimizer.state.{moment}." for moment in MOMENTS}
"""What comes before a weight's name in those of Adam's moments of it."""
STEPS = ("step", "common_step")
RANKS = ("world_size", "tensor", "pipeline", "context", "expert", "expert_tensor")
"""Of a layout, what decides which rank is which."""


def load_tensors(state: dict, path: Path) -> None:
    """Put what a checkpoint has in the place of a sharded state's descriptions."""
    places = [
        (container, key, value)
        for container, key, value in nested_items_iter(state)
        if isinstance(value, ShardedBase | LocalNonpersistentObject)
    ]
    wanted = {
        number: value for number, (*_, value) in enumerate(places) if isinstance(value, ShardedBase)
    }
    loaded = dist_checkpointing.load({"wanted": wanted}, str(path)).get("wanted", {})
    for number, (container, key, value) in enumerate(places):
        container[key] = loaded[number] if number in wanted else value.unwrap()


def without_extra_states(model: dict) -> dict:
    """A model's sharded state without TransformerEngine's notes: empty but for FP8."""
    for container, key, value in list(nested_items_iter(model)):
        if isinstance(value, ShardedObject):
            container[key] = None
    return model


def names(path: Path) -> set[str]:
    """Of all that a checkpoint holds in parts."""
    return set(FileSystemReader(path).read_metadata().state_dict_metadata)


def master_name(stored: set[str]) -> str:
    """What comes before a weight's name in that of its master weight, given the names of all that a
    checkpoint holds: nothing in float32 without the distributed optimizer."""
    return next((m for m in MASTERS if any(name.startswith(m) for name in stored)), "")


def name_masters(state: dict, stored: set[str]) -> None:
    """Have an optimizer's sharded state look for master weights under the name that they have in
    the checkpoint."""
    found = master_name(stored)
    for container, key, value in list(nested_items_iter(state)):
        for prefix in MASTERS:
            if isinstance(value, ShardedBase) and value.key.startswith(prefix):
                container[key] = replace(value, key=found + value.key.removeprefix(prefix))


def adam_steps(stored: dict | list) -> int:
    """The steps that Adam has done, from what ranks have in common of any kind of optimizer."""
    return next(int(value) for _, key, value in nested_items_iter(stored) if key in STEPS)


def set_adam_steps(adam: torch.optim.Optimizer, steps: int) -> None:
    """torch's Adam counts for each parameter, TransformerEngine's for each group."""
    if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
        for state in adam.state.values():
            state["step"] = torch.tensor(float(steps))
    else:
        for group in adam.param_groups:
            group["step"] = steps


def same_ranks(layout: dict, other: dict) -> bool:
    """Whether a rank has the same place in both layouts."""
    return all(layout[key] == other[key] for key in RANKS)


def random_states() -> ShardedObject:
    """The states of all generators of this rank."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", states, (dist.get_world_size(),), (dist.get_rank(),))


def set_random_states(states: dict) -> None:
    """Go on drawing where the rank was."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def draw_anew(seed: int, step: int) -> None:
    """Generators for a rank of another layout, which has no one to take states over from: they
    start from the run's seed and the step, so as not to repeat what was drawn before."""
    digest = blake2b(f"{seed} {step}".encode(), digest_size=4).digest()
    own = int.from_bytes(digest, "big")
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    model_parallel_cuda_manual_seed(own)
