"""What is kept of every start of a run, so that it can be done again: the config with all its
values, the code, the packages and the environment."""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from gengram_megatron import __version__
from gengram_megatron.config.load import dump_config
from gengram_megatron.launch.job import Job
from gengram_megatron.training.folder import make_folder

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
