"""All that the doctor finds out, as `gengram doctor --json` prints it.

What could fail or hang is asked of processes of their own. Versions are those of the installed
packages' own descriptions, so that nothing has to be imported.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from gengram_megatron.commands.doctor import disk, fit
from gengram_megatron.commands.doctor.fit import advice, explained, sample
from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.problems.engine import gpu_problems
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.gpus import nvidia_gpus
from gengram_megatron.launch.job import processes_of_a_node
from gengram_megatron.runs.store import estimated_size

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


LINKS_SECONDS = 60
"""For nvidia-smi, which never answers where a driver hangs."""


QUICK = [
    "what torch and megatron-core make of this machine, and the parts of the model (--quick)",
    "speeds (--quick)",
]
NO_SPEEDS = ["speeds of a matrix product, an all-reduce and the disk (--no-speeds)"]
"""What the two options leave out."""


def examine(config: Config | None, quick: bool, speeds: bool = True) -> dict:
    """Under `problems` are the reasons why the config cannot run here; without a config, why
    none can; under `left_out`, what was not looked at.

    Args:
        quick: starts no process with torch, which takes seconds to import: GPUs are those that
            nvidia-smi lists.
        speeds: measure them, unless quick.
    """
    return _Examination(config, quick, speeds and not quick).found


class _Examination:
    """Fills in what is found out; what cannot be is None, and a problem says why."""

    def __init__(self, config: Config | None, quick: bool, speeds: bool):
        self.config = config
        self.problems: list[str] = []
        links = None if quick else _links()
        self.found = {"software": software(not quick), "devices": None, "links": links}
        self.found["devices"] = _listed_devices() if quick else self._devices_of_torch()
        layout = self._layout()
        self.found["extensions"] = self.found["parts"] = None
        if not quick:
            self._look_at_parts(layout)
        self._look_at_size(layout)
        self.found["folder"] = self._folder(speeds)
        self.found["measured"] = self._measured(layout) if speeds else None
        self.found["left_out"] = QUICK if quick else [] if speeds else NO_SPEEDS
        self.found["advice"] = list(advice(self.found, config))
        self.found["problems"] = self.problems

    def _ask(self, module: str, problem: str, given: str = "") -> dict | None:
        """The answer of a process; if there is none, that is a problem."""
        try:
            return ask(module, given=given)
        except NoAnswer as reason:
            self.problems.append(f"{problem}: {reason}")

    def _devices_of_torch(self) -> dict | None:
        found = self._ask("devices", problem="torch does not work here")
        return found and {**found, "listed_by": "torch"}

    def _layout(self) -> Layout | None:
        if self.config is None:
            return None
        launch, devices = self.config.launch, self.found["devices"]
        if devices is None and launch.processes is None:
            return None  # one for each GPU, and nobody knows how many there are
        processes = processes_of_a_node(launch, len(devices["gpus"]) if devices else 0)
        try:
            layout = check_layout(self.config, launch.nodes * processes)
        except UserError as error:
            self.problems += str(error).splitlines()
            return None
        if devices is None or self._fits_gpus(devices["gpus"]):
            return layout

    def _fits_gpus(self, gpus: list[dict]) -> bool:
        capabilities = (gpu["compute_capability"].split(".") for gpu in gpus)
        oldest = min((tuple(map(int, one)) for one in capabilities), default=None)
        problems = list(gpu_problems(self.config, oldest))
        self.problems += problems
        return not problems

    def _look_at_parts(self, layout: Layout | None) -> None:
        """What megatron-core found; and of a layout that works, what the parts will be."""
        config, devices = self.config, self.found["devices"]
        if devices is None:
            return
        of = layout and layout.projection(bool(devices["gpus"]))
        given = sample(config, of).model_dump_json() if layout else ""
        what = "a model with the parts of this config" if layout else "megatron-core"
        built = self._ask("built", problem=f"{what} does not work here", given=given)
        if built is None:
            return
        self.found["extensions"] = built["extensions"]
        if layout:
            self.found["parts"] = explained(
                built["parts"],
                config,
                of,
                devices["gpus"],
                self.found["software"],
                built["extensions"],
            )

    def _look_at_size(self, layout: Layout | None) -> None:
        self.found["plan"] = None
        if layout is None:
            return
        devices = self.found["devices"]
        on_gpu = devices is None or bool(devices["gpus"])
        self.found["plan"] = planned = fit.planned(self.config, layout, on_gpu)
        if devices:
            total, gpus = planned["memory_bytes_per_rank"]["total"], devices["gpus"]
            self.problems += fit.memory_problems(self.config, total, gpus)

    def _folder(self, speeds: bool) -> dict | None:
        """The run's folder; without a config, the current one."""
        folder = Path(self.config.run.dir if self.config else ".").absolute()
        try:
            with disk.made(folder):
                free = disk.room(folder)
                speed = disk.speed(folder) if speeds else None
        except UserError as error:
            self.problems.append(str(error))
            return None
        except OSError as error:
            self.problems.append(f"run.dir {folder} cannot be written to: {error.strerror}")
            return None
        checkpoint = estimated_size(self.config) if self.config else None
        if checkpoint:
            self.problems += fit.room_problems(free, checkpoint)
        sizes = {"free_bytes": free, "checkpoint_bytes": checkpoint}
        return {"path": str(folder), **sizes, "speed": speed}

    def _measured(self, layout: Layout | None) -> dict | None:
        if self.found["devices"] is None:
            return None
        several = layout is None or layout.world_size > 1
        return {
            "matrix_product": self._ask("product", problem="torch cannot multiply here"),
            "all_reduce": self._all_reduce(several),
        }

    def _all_reduce(self, needed: bool) -> dict | None:
        """Between two processes. needed: the run has several."""
        with tempfile.TemporaryDirectory() as folder:
            meeting = str(Path(folder) / "meeting")
            try:
                return ask_together("all_reduce", [[str(rank), "2", meeting] for rank in (0, 1)])[0]
            except NoAnswer as reason:
                if needed:
                    self.problems.append(f"two processes cannot add up numbers: {reason}")


def _listed_devices() -> dict:
    """What devices.py prints, as far as it is known without torch."""
    return {
        "cuda": None,
        "nccl": None,
        "gpus": [asdict(gpu) for gpu in nvidia_gpus()],
        "threads": len(os.sched_getaffinity(0)),
        "listed_by": "nvidia-smi",
    }


def _links() -> str | None:
    """Between GPUs and network adapters, as NVIDIA's own tool draws them; None without an answer of
    it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "topo", "-m"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LINKS_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
