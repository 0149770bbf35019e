"""The layout of a run, from a config whose keys go together: every null is resolved, and what
cannot work is refused.

Also resolved here: whether key and value are projected from the features of each token, or the
tables are projected once a step and looked up then (engine/model/gengram/projected.py). Both give
the same numbers.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from gengram_megatron.config.problems.engine import (
    engine_problems,
    installation_problems,
    precision_problems,
)
from gengram_megatron.config.problems.model import (
    attention_problems,
    expert_problems,
    expert_tensor,
    gengram_problems,
    projection_obstacles,
    ranks_of_a_copy,
    ranks_of_the_experts,
    sequence_parallel,
)
from gengram_megatron.config.problems.parallel import (
    batch_problems,
    checkpoint_problems,
    optimizer_problems,
    pipeline_problems,
    sequence_problems,
    split_problems,
    world_problems,
)
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import ALPHABET_SIZE, SMALL_K, Placement, placements
from gengram_megatron.errors import UserError

RESERVED_STEPS = 0xFFFFFFF0
"""Slurm numbers the steps that srun starts from 0, and the script's and the shell's from here."""


class Projection(NamedTuple):
    """of: features or tables."""

    of: str
    reason: str


@dataclass(frozen=True)
class Layout:
    """How a run is spread over its processes, with every null of the config resolved."""

    world_size: int
    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    context: int
    expert: int
    expert_tensor: int
    sequence: bool
    data: int
    expert_data: int
    num_microbatches: int
    """Microbatches that each data-parallel rank runs a step."""
    steps: int
    samples: int
    """Samples of the whole run: whole global batches only."""
    placements: tuple[Placement, ...] = ()
    """How each table of a layer with memory is split over the ranks."""
    projections: tuple[Projection, Projection] | None = None
    """What is projected where the run is on CPUs, and where it is on GPUs; None: no memory."""

    def projection(self, on_gpu: bool) -> Projection | None:
        """What is projected on one kind of machine; None: there is no memory."""
        return self.projections and self.projections[on_gpu]

    @property
    def rows_shared_over(self) -> str | None:
        """The group that shares tables by rows, if it is the data- or the expert-parallel one."""
        return next((one.over for one in self.placements if one.over in ("data", "expert")), None)

    def sizes(self) -> dict[str, Any]:
        """All that is a number, a flag or None, by name: what a checkpoint keeps of a layout."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("placements", "projections")
        }


def world_size_from_environment() -> tuple[int, int]:
    """World size and rank as torchrun or srun set them; 1 and 0 for a process on its own."""
    for size_name, rank_name in (("WORLD_SIZE", "RANK"), ("SLURM_NTASKS", "SLURM_PROCID")):
        size, rank = os.environ.get(size_name), os.environ.get(rank_name)
        if size is None and rank is None:
            continue
        if size is None or rank is None:
            there, absent = (rank_name, size_name) if size is None else (size_name, rank_name)
            raise UserError(
                f"the environment has {there} but not {absent}: "
                "start with torchrun or srun, which set both, or unset it"
            )
        if not (size.isdecimal() and rank.isdecimal() and int(rank) < int(size)):
            raise UserError(
                f"the environment has {size_name}={size} and {rank_name}={rank}: "
                f"{rank_name} must be a whole number from 0 to {size_name} - 1"
            )
        if size_name == "SLURM_NTASKS" and int(size) > 1 and not _started_by_srun():
            raise UserError(
                f"the environment has SLURM_NTASKS={size}, but srun did not start this process, so "
                f"it would wait for {int(size) - 1} that never come: put srun before the command, "
                "or leave the job to `gengram launch --slurm`"
            )
        return int(size), int(rank)
    return 1, 0


def _started_by_srun() -> bool:
    """Whether this process is a task of a job step. sbatch gives its script the number of tasks
    and a rank as well, and so does the shell of salloc, whose step has a reserved number."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < RESERVED_STEPS


def check_model(config: Config) -> None:
    """UserError with one line for each thing that no run of this model could do, whatever its
    processes and its machine."""
    if problems := [*_model_problems(config), *optimizer_problems(config)]:
        raise UserError("\n".join(problems))


def _model_problems(config: Config) -> Iterator[str]:
    yield from attention_problems(config)
    yield from expert_problems(config)
    yield from gengram_problems(config)


def check_layout(config: Config, world_size: int) -> Layout:
    """The layout of a run on so many processes.

    Raises UserError with one line for each thing that cannot work.
    """
    problems = [
        *installation_problems(config),
        *_model_problems(config),
        *split_problems(config),
        *pipeline_problems(config),
        *sequence_problems(config),
        *world_problems(config, world_size),
        *batch_problems(config, world_size),
        *optimizer_problems(config),
        *engine_problems(config),
        *checkpoint_problems(config),
        *precision_problems(config),
    ]
    if problems:
        raise UserError("\n".join(problems))
    parallel, train = config.parallel, config.train
    data = world_size // ranks_of_a_copy(config)
    steps = train.steps or train.samples // train.global_batch_size
    sizes = Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        expert=parallel.expert,
        expert_tensor=expert_tensor(config),
        sequence=sequence_parallel(config),
        data=data,
        expert_data=world_size // ranks_of_the_experts(config),
        num_microbatches=train.global_batch_size // (train.micro_batch_size * data),
        steps=steps,
        samples=steps * train.global_batch_size,
    )
    return with_memory(sizes, config)


def with_memory(layout: Layout, config: Config) -> Layout:
    """A layout with what follows from it for the memory of a config, if that has one."""
    if not config.model.gengram.enabled:
        return layout
    return replace(
        layout,
        placements=placements(config, layout.world_size),
        projections=(
            _projection(config, layout, on_gpu=False),
            _projection(config, layout, on_gpu=True),
        ),
    )


def _projection(config: Config, layout: Layout, on_gpu: bool) -> Projection:
    """What is projected, of a config with memory."""
    gengram = config.model.gengram
    if gengram.project != "auto":
        return Projection(gengram.project, f"gengram.project is {gengram.project}")
    if on_gpu:
        return Projection("features", "on GPUs the other way has not been measured")
    if max(gengram.kmer_sizes) > SMALL_K:
        return Projection("features", f"k is above {SMALL_K}")
    for obstacle, _ in projection_obstacles(config):
        return Projection("features", obstacle)
    tokens = layout.num_microbatches * config.train.micro_batch_size * config.model.seq_length
    tokens //= layout.context
    needed = break_even(max(gengram.kmer_sizes))
    found = f"{tokens:,} tokens a step and rank, and {needed:,} rows a table on average"
    return Projection("tables" if tokens > needed else "features", found)


def is_first_on_its_node() -> bool:
    """Whether this process is the first on its machine, by what torchrun and srun say; where neither
    does, every process counts as first.

    All ranks find the same faults in the same file, so one of each machine tells them; a file that
    is missing on a single machine is told as well.
    """
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def break_even(largest: int) -> int:
    """The tables' rows over their number: as many tokens' features cost as much to project."""
    return sum(ALPHABET_SIZE**k for k in range(1, largest + 1)) // largest


def bytes_held(config: Config) -> int:
    """Of a layer's projected tables and their gradient, in float32, on every rank."""
    gengram, largest = config.model.gengram, max(config.model.gengram.kmer_sizes)
    rows = sum(ALPHABET_SIZE**k for k in range(1, largest + 1))
    if gengram.window is not None and largest > 1:
        rows += ALPHABET_SIZE ** (
            largest - 1
        )  # what begins a window (engine/model/gengram/projected.py)
    return 2 * 4 * rows * 2 * config.model.hidden_size
