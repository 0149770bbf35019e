"""A job: a checked config, its processes, and the record of one start.

Every start of a run is recorded, so that it can be repeated: the whole config, the code, the
packages and the environment.
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
from typing import Any

from gengram_megatron import __version__
from gengram_megatron.config.launch import UNLIMITED, Launch
from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.load import dump_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.runs.folder import make_folder

SLURM_IS_EARLY = 60
"""Seconds by which Slurm may send a signal too early, according to its manual."""
SLURM_FILE = "slurm_job.txt"
RANK_MODULE = "gengram_megatron.commands.rank"


@dataclass(frozen=True)
class Job:
    """One start of a run.

    Attributes:
        processes: processes per node.
        name: name of this start, unique in the run's folder.
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
        """The folder that records config, code version and environment of this start."""
        return self.run / "launches" / self.name

    @property
    def config_file(self) -> Path:
        """The config that the processes read: the whole config at the time of the start."""
        return self.record / "config.yaml"

    @property
    def slurm_file(self) -> Path:
        """The file with the number of this start's Slurm job."""
        return self.record / SLURM_FILE

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that every process gets in addition to those of its machine."""
        launch = self.config.launch
        needed = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if _needs_one_connection(self.config) else {}
        if launch.cpus is not None:
            needed["OMP_NUM_THREADS"] = str(launch.cpus)
        return {**needed, **launch.environment}


def check_job(config: Config, name: str, for_slurm: bool) -> Job:
    """Returns the job of a config. Raises UserError with one line for each problem, before anything
    is started."""
    problems = [*(_slurm_problems(config.launch) if for_slurm else _local_problems(config.launch))]
    if problems:
        raise UserError("\n".join(problems))
    launch = config.launch
    processes = processes_of_a_node(launch)
    layout = check_layout(config, launch.nodes * processes)
    return Job(config, layout, processes, name)


def processes_of_a_node(launch: Launch, gpus: int | None = None) -> int:
    """Returns launch.processes, or, if it is null, one for each GPU of this machine, but at least
    one.

    Args:
        gpus: number of GPUs of this machine; None to ask torch.
    """
    if launch.processes is None and gpus is None:
        gpus = _gpus_here()
    return launch.processes or gpus or 1


def _slurm_problems(launch: Launch) -> Iterator[str]:
    if launch.processes is None:
        yield "launch.processes is null, but Slurm needs it: give --nproc, the GPUs per node"
    before, limit = launch.slurm.save_before, launch.slurm.time
    if limit is not None and before + SLURM_IS_EARLY >= seconds(limit):
        yield (
            f"launch.slurm.save_before is {before} seconds, but launch.slurm.time {limit} is only "
            f"{seconds(limit)} seconds: the job would be told to stop as soon as it starts; give it "
            "more time, or lower save_before"
        )


def _local_problems(launch: Launch) -> Iterator[str]:
    if launch.nodes > 1 and launch.rendezvous is None:
        yield (
            f"launch.nodes is {launch.nodes}, but launch.rendezvous is null: give the HOST:PORT "
            "of one of the nodes, start with --slurm, or give --nodes 1 to use this machine alone"
        )


def seconds(limit: str) -> float:
    """Returns the seconds of a Slurm time limit: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, or a word for
    no limit."""
    if limit.lower() in UNLIMITED:
        return math.inf
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, last = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + last


def _needs_one_connection(config: Config) -> bool:
    """Returns whether megatron-core relies on the order in which kernels are launched.

    With a single queue between host and GPU, communication that is launched first also starts
    first, and therefore overlaps with the computation that it should overlap with.
    """
    parallel, optimizer = config.parallel, config.optimizer
    return parallel.tensor > 1 or parallel.context > 1 or optimizer.overlap_grad_reduce


def _gpus_here() -> int:
    """Returns the number of GPUs that torch can use here, without initialising CUDA."""
    import torch

    return torch.cuda.device_count()


def log_file(logs: Path, rank: int) -> Path:
    """Returns the log file of a rank. srun's `--output` uses the same name (see slurm.py)."""
    return logs / f"rank-{rank}.log"


PACKAGE = Path(__file__).parents[1]
PREFIXES = ("CUDA_", "NCCL_", "OMP_", "TORCH", "PYTORCH_", "GLOO_", "UCX_", "SLURM_")
NAMES = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HOSTNAME")
SECRET = "SLURM_JWT"


def write_record(job: Job) -> None:
    """Writes config.yaml, code.json, code.diff, packages.txt and environment.json of a start."""
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


def code_version() -> tuple[dict[str, Any], bytes]:
    """Returns the package's version, with its commit and changed files in a checkout, and a patch
    of the changes to tracked files."""
    version = {"version": __version__, "python": sys.version, "command": sys.argv}
    # Without this check, a package installed in the .venv of another repository would record that
    # repository's commit.
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
    """Returns all installed packages, as in `pip freeze`."""
    installed = {f"{package.name}=={package.version}" for package in distributions()}
    return sorted(installed, key=str.lower)


def variables() -> dict[str, str]:
    """Returns the environment variables that affect how a run computes."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name in NAMES or name.startswith(PREFIXES)) and name != SECRET
    }


def _git(*words: str) -> bytes | None:
    """Runs git in the checkout of this package, and returns its output; None if it fails or is not
    installed."""
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE.parent), *words], capture_output=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
