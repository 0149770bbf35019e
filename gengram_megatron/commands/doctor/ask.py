"""Runs checks that could fail or hang in separate processes, and reads the versions of installed
packages without importing them."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

SECONDS = 300
"""Time limit of a process. On a busy machine the import of torch alone takes a minute."""
LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS",
)  # fmt: skip
"""Environment variables that would make a process a rank of a run."""

Findings = dict[str, dict[str, str | None]]
"""What was found out about several things, by name."""


class NoAnswer(Exception):
    """A process gave no answer. The message says why: its exception in one line, the signal that
    killed it, the time limit, or its last line of output."""


def ask(module: str, *words: str, given: str = "") -> dict[str, Any]:
    """Runs a module of this package in a separate process, and returns the JSON in the last line of
    its output. Raises NoAnswer if there is none.

    Args:
        words: its command-line arguments.
        given: its standard input.
    """
    output = _run("-m", f"{__package__}.{module}", *words, given=given)
    last = (output.splitlines() or [""])[-1]
    try:
        answer: dict[str, Any] = json.loads(last)
    except ValueError:
        raise NoAnswer(f"its last line is not JSON: {last[:80]!r}") from None
    return answer


def ask_together(module: str, each: list[list[str]]) -> list[dict[str, Any]]:
    """Runs several processes at the same time, one for each list of arguments, and returns their
    answers."""
    with ThreadPoolExecutor(len(each)) as threads:
        return list(threads.map(lambda words: ask(module, *words), each))


def try_import(package: str) -> str | None:
    """Returns why a package cannot be imported, or None if it can."""
    try:
        _run("-c", f"import {package}")
    except NoAnswer as reason:
        return str(reason)
    return None


def _run(*words: str, given: str = "") -> str:
    """Runs Python with these arguments, and returns its standard output. Raises NoAnswer."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    try:
        done = subprocess.run(
            [sys.executable, *words],
            input=given,
            env=clean,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer within {SECONDS} seconds") from None
    if done.returncode < 0:
        raise NoAnswer(f"killed by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit code {done.returncode}"
        raise NoAnswer(re.sub(r"^\[rank\d+\]: ", "", last))  # torch adds it in process groups
    return done.stdout


NEEDED = ("torch", "megatron-core")
OPTIONAL = {
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "apex",
    "deepspeed": "deepspeed",
    "flash-attn": "flash_attn",
    "triton": "triton",
}
"""The module to import of each optional package, by the package's name for pip."""


def software(try_imports: bool) -> Findings:
    """Returns the version of each package (None if it is not installed), and why it cannot be
    imported (None if it can, or was not tried)."""
    packages: Findings = {"python": {"version": platform.python_version(), "error": None}}
    for name in NEEDED:
        packages[name] = {"version": _version(name), "error": None}
    for name, module in OPTIONAL.items():
        installed = _version(name)
        if installed is None and find_spec(module.split(".")[0]):
            installed = "unknown"  # on Python's path, but not installed by pip
        packages[name] = {"version": installed, "error": None}
        if installed and try_imports:
            packages[name]["error"] = try_import(module)
    return packages


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
