"""Questions to processes of their own, because what is asked could fail or hang, and the versions of
installed packages, for which nothing has to be imported."""

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

SECONDS = 300
"""A process that takes longer is ended. On a busy machine the import of torch alone takes a
minute."""
LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS",
)  # fmt: skip
"""Variables that would make a process a rank of a run."""


class NoAnswer(Exception):
    """Why a process gave none: its exception in one line, its signal, its time, or what it said."""


def ask(module: str, *words: str, given: str = "") -> dict:
    """What a module of this package prints as JSON in its last line.

    given: what it reads from its standard input.
    """
    said = _run("-m", f"{__package__}.{module}", *words, given=given)
    last = (said.splitlines() or [""])[-1]
    try:
        return json.loads(last)
    except ValueError:
        raise NoAnswer(f"its last line is no JSON: {last[:80]!r}") from None


def ask_together(module: str, each: list[list[str]]) -> list[dict]:
    """The answers of processes that run at the same time, one for each list of words."""
    with ThreadPoolExecutor(len(each)) as threads:
        return list(threads.map(lambda words: ask(module, *words), each))


def try_import(package: str) -> str | None:
    """Why a package cannot be imported; None: it can."""
    try:
        _run("-c", f"import {package}")
    except NoAnswer as reason:
        return str(reason)
    return None


def _run(*words: str, given: str = "") -> str:
    """Its standard output."""
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
        raise NoAnswer(re.sub(r"^\[rank\d+\]: ", "", last))  # torch's, once it has a rank
    return done.stdout


NEEDED = ("torch", "megatron-core")
OPTIONAL = {
    "transformer-engine": "transformer_engine.pytorch",
    "apex": "apex",
    "deepspeed": "deepspeed",
    "flash-attn": "flash_attn",
    "triton": "triton",
}
"""Their names for pip, and what is imported of each."""


def software(try_imports: bool) -> dict[str, dict]:
    """Version of each package (None: not installed), and why it cannot be imported (None: it can,
    or was not tried)."""
    found = {"python": {"version": platform.python_version(), "error": None}}
    for name in NEEDED:
        found[name] = {"version": _version(name), "error": None}
    for name, package in OPTIONAL.items():
        there = _version(name)
        if there is None and find_spec(package.split(".")[0]):
            there = "unknown"  # put on the path without being installed
        found[name] = {"version": there, "error": None}
        if there and try_imports:
            found[name]["error"] = try_import(package)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
