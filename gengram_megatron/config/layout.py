"""Checks that the keys of a config fit together, and derives the layout of the run from them, with
every null resolved.

This includes the choice of how key and value are computed: by projecting each token's features, or
by projecting the tables once a step and looking up the result (engine/model/gengram/projected.py).
Both give the same numbers.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

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
"""Slurm numbers the job steps that srun starts from 0; numbers from this one on are reserved, for
example for the steps of sbatch's script and of salloc's shell."""


class Projection(NamedTuple):
    """How key and value are computed: `input` says what is projected, "features" or "tables"."""

    input: Literal["features", "tables"]
    reason: str


@dataclass(frozen=True)
class Layout:
    """How a run is distributed over its processes, with every null of the config resolved. Fields
    named for a kind of parallelism hold its size."""

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
    """Microbatches of each data-parallel rank per step."""
    steps: int
    samples: int
    """Samples of the whole run, a multiple of the global batch size."""
    placements: tuple[Placement, ...] = ()
    """How each table of a Gengram layer is split over the ranks."""
    projections: tuple[Projection, Projection] | None = None
    """What is projected on CPUs, and what on GPUs; None without Gengram."""

    def projection(self, on_gpu: bool) -> Projection | None:
        """Returns what is projected on CPUs or GPUs; None without Gengram."""
        return self.projections and self.projections[on_gpu]

    @property
    def rows_shared_over(self) -> str | None:
        """The group that tables are split over by rows, if it is the data- or expert-parallel one,
        otherwise None."""
        groups = (placement.rows_over for placement in self.placements)
        return next((group for group in groups if group in ("data", "expert")), None)

    def sizes(self) -> dict[str, Any]:
        """Returns the fields that are numbers, flags or None, by name. A checkpoint stores them."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("placements", "projections")
        }


def world_size_from_environment() -> tuple[int, int]:
    """Returns the world size and rank that torchrun or srun set; 1 and 0 for a single process.

    Raises UserError if only one of the two is set, if they do not fit together, or if Slurm
    allotted several tasks but srun did not start this process.
    """
    for size_name, rank_name in (("WORLD_SIZE", "RANK"), ("SLURM_NTASKS", "SLURM_PROCID")):
        size, rank = os.environ.get(size_name), os.environ.get(rank_name)
        if size is None and rank is None:
            continue
        if size is None or rank is None:
            present, absent = (rank_name, size_name) if size is None else (size_name, rank_name)
            raise UserError(
                f"the environment has {present} but not {absent}: "
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
                f"it would wait forever for {int(size) - 1} others: put srun before the command, "
                "or start the job with `gengram launch --slurm`"
            )
        return int(size), int(rank)
    return 1, 0


def _started_by_srun() -> bool:
    """Returns whether srun started this process. The number of tasks and a rank alone do not show
    it: the script of sbatch and the shell of salloc (a step with a reserved number) have them too.
    """
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < RESERVED_STEPS


def check_model(config: Config) -> None:
    """Raises UserError with one line for each problem that no number of processes and no machine
    could solve."""
    if problems := [*_model_problems(config), *optimizer_problems(config)]:
        raise UserError("\n".join(problems))


def _model_problems(config: Config) -> Iterator[str]:
    yield from attention_problems(config)
    yield from expert_problems(config)
    yield from gengram_problems(config)


def check_layout(config: Config, world_size: int) -> Layout:
    """Returns the layout of a run on `world_size` processes.

    Raises UserError with one line for each problem.
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
    # batch_problems makes sure that exactly one of the two is given.
    steps = train.steps or (train.samples or 0) // train.global_batch_size
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
    return with_gengram(sizes, config)


def with_gengram(layout: Layout, config: Config) -> Layout:
    """Returns the layout with the placements and projections of Gengram filled in; unchanged if
    Gengram is not enabled."""
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
    """Chooses what is projected, for a config with Gengram."""
    gengram = config.model.gengram
    if gengram.project != "auto":
        return Projection(gengram.project, f"gengram.project is {gengram.project}")
    if on_gpu:
        return Projection("features", "projecting tables has not been measured on GPUs")
    if max(gengram.kmer_sizes) > SMALL_K:
        return Projection("features", f"k is above {SMALL_K}")
    for obstacle, _ in projection_obstacles(config):
        return Projection("features", obstacle)
    tokens = layout.num_microbatches * config.train.micro_batch_size * config.model.seq_length
    tokens //= layout.context
    needed = break_even(max(gengram.kmer_sizes))
    reason = f"{tokens:,} tokens per step and rank, and {needed:,} rows per table on average"
    return Projection("tables" if tokens > needed else "features", reason)


def is_first_on_its_node() -> bool:
    """Returns whether this process is the first on its machine, according to torchrun or srun.
    Without either, every process counts as the first.

    All ranks find the same problems in the same file, so one process per machine reports them. A
    file that is missing on only one machine is reported too.
    """
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


def break_even(largest: int) -> int:
    """Returns the average number of rows per table for k from 1 to `largest`. Projecting the
    features of that many tokens costs as much as projecting the tables."""
    return _rows_up_to(largest) // largest


def _rows_up_to(largest: int) -> int:
    """Returns the number of all k-mers for k from 1 to `largest`."""
    return sum(ALPHABET_SIZE**k for k in range(1, largest + 1))


def projected_table_bytes(config: Config) -> int:
    """Returns the size in bytes of one layer's projected tables and their gradient, in float32.
    Every rank holds all of them."""
    gengram, largest = config.model.gengram, max(config.model.gengram.kmer_sizes)
    rows = _rows_up_to(largest)
    if gengram.window is not None and largest > 1:
        # Rows for the start of a window (engine/model/gengram/projected.py).
        rows += ALPHABET_SIZE ** (largest - 1)
    return 2 * 4 * rows * 2 * config.model.hidden_size
