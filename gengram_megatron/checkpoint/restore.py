"""Tensors of a checkpoint, whatever layout wrote it, into the states of this run.

Tensors have global names, so megatron-core finds each rank's parts of them. What else a checkpoint
holds of the optimizer is what its first rank had: so many optimizers, so many groups of parameters.
A run has its own, with settings from its config, and takes over only how many steps Adam has done.
"""

import random
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

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
from torch.distributed.checkpoint import FileSystemReader

from gengram_megatron.training.engines.zero import MOMENTS

MASTERS = ("optimizer.state.param.", "optimizer.state.fp32_param.")
"""Of master weights: the distributed optimizer calls them so, and the plain one in bf16."""
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
