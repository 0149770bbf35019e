"""What is launched: a checked config, its processes, and the files that one start leaves behind.

Every start of a run is recorded, so that it can be repeated: the config with all its values, the
code, the packages and the environment.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from gengram_megatron import __version__
from gengram_megatron.config.launch import UNLIMITED, Launch
from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.load import dump_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.runs.folder import make_folder

SLURM_IS_EARLY = 60
"""Seconds by which Slurm may send a signal too soon, as its manual says."""
SLURM_FILE = "slurm_job.txt"
RANK_MODULE = "gengram_megatron.commands.rank"


@dataclass(frozen=True)
class Job:
    """One start of a run.

    processes: of each node.
    name: of this start, unique in the run's folder.
    """

    config: Config
    layout: Layout
    processes: int
    name: str

    @property
    def run(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir).absolute()

    @property
    def record(self) -> Path:
        """Where config, code version and environment of this start are kept."""
        return self.run / "launches" / self.name

    @property
    def config_file(self) -> Path:
        """What the processes read: the whole config, as it was when the run was started."""
        return self.record / "config.yaml"

    @property
    def slurm_file(self) -> Path:
        """Under which number Slurm has this start in its queue."""
        return self.record / SLURM_FILE

    @property
    def environment(self) -> dict[str, str]:
        """Variables that every process gets on top of those of its machine."""
        launch = self.config.launch
        needed = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if _needs_one_connection(self.config) else {}
        if launch.cpus is not None:
            needed["OMP_NUM_THREADS"] = str(launch.cpus)
        return {**needed, **launch.environment}


def check_job(config: Config, name: str, for_slurm: bool) -> Job:
    """The job of a config, or UserError with what does not fit, before anything is started."""
    problems = [*(_slurm_problems(config.launch) if for_slurm else _local_problems(config.launch))]
    if problems:
        raise UserError("\n".join(problems))
    launch = config.launch
    processes = processes_of_a_node(launch)
    layout = check_layout(config, launch.nodes * processes)
    return Job(config, layout, processes, name)


def processes_of_a_node(launch: Launch, gpus: int | None = None) -> int:
    """Those that are asked for, or one for each GPU of this machine; gpus: their number, or None to
    ask torch."""
    if launch.processes is None and gpus is None:
        gpus = _gpus_here()
    return launch.processes or gpus or 1


def _slurm_problems(launch: Launch) -> Iterator[str]:
    if launch.processes is None:
        yield "launch.processes is null: Slurm needs their number; give --nproc, the GPUs of a node"
    before, limit = launch.slurm.save_before, launch.slurm.time
    if limit is not None and before + SLURM_IS_EARLY >= seconds(limit):
        yield (
            f"launch.slurm.save_before is {before} seconds, and the time limit {limit} is "
            f"{seconds(limit)} seconds: a job would be told to stop as soon as it starts; give it "
            "more time, or save later"
        )


def _local_problems(launch: Launch) -> Iterator[str]:
    if launch.nodes > 1 and launch.rendezvous is None:
        yield (
            f"launch.nodes is {launch.nodes}, but launch.rendezvous is null: give the HOST:PORT "
            "of one of the nodes, start with --slurm, or give --nodes 1 to use this machine alone"
        )


def seconds(limit: str) -> float:
    """A time limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or a word for none."""
    if limit.lower() in UNLIMITED:
        return math.inf
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, rest = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _needs_one_connection(config: Config) -> bool:
    """Whether megatron-core relies on the order in which kernels were started.

    With one queue between host and GPU, communication that was started first also begins first,
    and so overlaps with the computation it was meant to.
    """
    parallel, optimizer = config.parallel, config.optimizer
    return parallel.tensor > 1 or parallel.context > 1 or optimizer.overlap_grad_reduce


def _gpus_here() -> int:
    """GPUs of this machine that torch may use; asking does not start CUDA in this process."""
    import torch

    return torch.cuda.device_count()


def log_file(logs: Path, rank: int) -> Path:
    """The log of a rank. Under srun `--output` names it so."""
    return logs / f"rank-{rank}.log"


PACKAGE = Path(__file__).parents[1]
PREFIXES = ("CUDA_", "NCCL_", "OMP_", "TORCH", "PYTORCH_", "GLOO_", "UCX_", "SLURM_")
NAMES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HOSTNAME")
SECRET = "SLURM_JWT"


def write_record(job: Job) -> None:
    """Write config.yaml, code.json, code.diff, packages.txt and environment.json of a start."""
    make_folder(job.run)
    job.record.mkdir(parents=True)
    job.config_file.write_text(dump_config(job.config))
    version, diff = code_version()
    (job.record / "code.json").write_text(json.dumps(version, indent=1) + "\n")
    if diff:
        (job.record / "code.diff").write_bytes(diff)
    (job.record / "packages.txt").write_text("".join(f"{line}\n" for line in packages()))
    environment = {**variables(), **job.environment}
    (job.record / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")


def code_version() -> tuple[dict, bytes]:
    """The package's version and, in a checkout, its commit and what has changed since.

    Returns what to write as JSON, and the changes of tracked files as a patch.
    """
    version = {"version": __version__, "python": sys.version, "command": sys.argv}
    # Not the commit of somebody else's repository that the package lies in, as in its .venv.
    tracked = _git("ls-files", "--error-unmatch", str(PACKAGE / "__init__.py"))
    commit = _git("rev-parse", "HEAD") if tracked else None
    if commit is None:
        return version, b""
    changed = _git("status", "--porcelain", "--untracked-files=all")
    return {
        **version,
        "commit": commit.decode().strip(),
        "changed": changed.decode().splitlines() if changed else [],
    }, _git("diff", "--binary", "HEAD") or b""


def packages() -> list[str]:
    """Everything that is installed, as in `pip freeze`."""
    return sorted({f"{found.name}=={found.version}" for found in distributions()}, key=str.lower)


def variables() -> dict[str, str]:
    """The part of the environment that decides how a run computes."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in NAMES or name.startswith(PREFIXES)) and name != SECRET
    }


def _git(*words: str) -> bytes | None:
    """What git says of the checkout that this package lies in; None where it refuses or is not
    installed."""
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE.parent), *words], capture_output=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
