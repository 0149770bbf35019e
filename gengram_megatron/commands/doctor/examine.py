"""Runs all checks of the doctor, and collects their results as `gengram doctor --json` prints
them."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gengram_megatron.commands.doctor import fit
from gengram_megatron.commands.doctor.ask import NoAnswer, ask, ask_together, software
from gengram_megatron.commands.doctor.fit import advice, explained, sample
from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.problems.engine import gpu_problems
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.gpus import nvidia_gpus
from gengram_megatron.launch.job import processes_of_a_node
from gengram_megatron.runs.folder import make_folder
from gengram_megatron.runs.store import estimated_size

LINKS_SECONDS = 60
"""Time limit for nvidia-smi, which never answers if a driver hangs."""
BLOCK = 8 << 20
BLOCKS = 32
"""The speed of the disk is measured with 256 MiB, more than disks buffer, but quickly written."""


QUICK = [
    "what torch and megatron-core find on this machine, and the parts of the model (--quick)",
    "speeds (--quick)",
]
NO_SPEEDS = ["speeds of a matrix product, an all-reduce and the disk (--no-speeds)"]
"""QUICK and NO_SPEEDS name what these two options leave out."""


def examine(config: Config | None, quick: bool, speeds: bool = True) -> dict[str, Any]:
    """Examines the machine and how the config would run on it.

    In the result, `problems` lists the reasons why the config cannot run here (without a config:
    why no config can), and `left_out` what was not examined.

    Args:
        quick: start no process with torch, which takes seconds to import; GPUs are those that
            nvidia-smi lists.
        speeds: whether to measure speeds; never if quick.
    """
    return _Examination(config, quick, speeds and not quick).found


class _Examination:
    """Runs the checks and fills in `found`. What cannot be found out is None, and `problems` says
    why."""

    def __init__(self, config: Config | None, quick: bool, speeds: bool):
        self.config = config
        self.problems: list[str] = []
        self.found: dict[str, Any] = {"software": software(not quick)}
        self.found["devices"] = _listed_devices() if quick else self._devices_of_torch()
        self.found["links"] = None if quick else _links()
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

    def _ask(
        self, module: str, *words: str, problem: str, given: str = ""
    ) -> dict[str, Any] | None:
        """Returns the answer of a process. If there is none, returns None and adds a problem."""
        try:
            return ask(module, *words, given=given)
        except NoAnswer as reason:
            self.problems.append(f"{problem}: {reason}")
            return None

    def _devices_of_torch(self) -> dict[str, Any] | None:
        found = self._ask("machine", "devices", problem="torch does not work here")
        return found and {**found, "listed_by": "torch"}

    def _layout(self) -> Layout | None:
        if self.config is None:
            return None
        launch, devices = self.config.launch, self.found["devices"]
        if devices is None and launch.processes is None:
            return None  # one process per GPU, but the number of GPUs is unknown
        processes = processes_of_a_node(launch, len(devices["gpus"]) if devices else 0)
        try:
            layout = check_layout(self.config, launch.nodes * processes)
        except UserError as error:
            self.problems += str(error).splitlines()
            return None
        fits = devices is None or self._fits_gpus(self.config, devices["gpus"])
        return layout if fits else None

    def _fits_gpus(self, config: Config, gpus: list[dict[str, Any]]) -> bool:
        capabilities = (gpu["compute_capability"].split(".") for gpu in gpus)
        oldest = min((tuple(map(int, one)) for one in capabilities), default=None)
        problems = list(gpu_problems(config, oldest))
        self.problems += problems
        return not problems

    def _look_at_parts(self, layout: Layout | None) -> None:
        """Finds out which fused parts megatron-core found, and, for a valid layout, which
        implementation each part of the model will use."""
        config, devices = self.config, self.found["devices"]
        if devices is None:
            return
        projection = layout.projection(bool(devices["gpus"])) if layout else None
        given = sample(config, projection).model_dump_json() if config and layout else ""
        what = "a model with the parts of this config" if layout else "megatron-core"
        built = self._ask("built", problem=f"{what} does not work here", given=given)
        if built is None:
            return
        self.found["extensions"] = built["extensions"]
        if config and layout:
            self.found["parts"] = explained(
                built["parts"],
                config,
                projection,
                devices["gpus"],
                self.found["software"],
                built["extensions"],
            )

    def _look_at_size(self, layout: Layout | None) -> None:
        self.found["plan"] = None
        if self.config is None or layout is None:
            return
        devices = self.found["devices"]
        on_gpu = devices is None or bool(devices["gpus"])
        self.found["plan"] = planned = fit.planned(self.config, layout, on_gpu)
        if devices:
            total, gpus = planned["memory_bytes_per_rank"]["total"], devices["gpus"]
            self.problems += fit.memory_problems(self.config, total, gpus)

    def _folder(self, speeds: bool) -> dict[str, Any] | None:
        """Examines the run's folder, or without a config the current folder."""
        folder = Path(self.config.run.dir if self.config else ".").absolute()
        try:
            with _made(folder):
                free = _free_bytes(folder)
                speed = _speed_of_disk(folder) if speeds else None
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

    def _measured(self, layout: Layout | None) -> dict[str, Any] | None:
        if self.found["devices"] is None:
            return None
        several = layout is None or layout.world_size > 1
        return {
            "matrix_product": self._ask("machine", "product", problem="torch cannot multiply here"),
            "all_reduce": self._all_reduce(several),
        }

    def _all_reduce(self, needed: bool) -> dict[str, Any] | None:
        """Measures an all-reduce between two processes.

        Args:
            needed: whether the run has several processes, so that a failure is a problem.
        """
        with tempfile.TemporaryDirectory() as folder:
            meeting = str(Path(folder) / "meeting")
            try:
                return ask_together(
                    "machine", [["all_reduce", str(rank), "2", meeting] for rank in (0, 1)]
                )[0]
            except NoAnswer as reason:
                if needed:
                    self.problems.append(f"an all-reduce of two processes fails: {reason}")
                return None


def _listed_devices() -> dict[str, Any]:
    """Returns what `devices` of machine.py returns, as far as it is known without torch."""
    return {
        "cuda": None,
        "nccl": None,
        "gpus": [asdict(gpu) for gpu in nvidia_gpus()],
        "threads": len(os.sched_getaffinity(0)),
        "listed_by": "nvidia-smi",
    }


def _links() -> str | None:
    """Returns nvidia-smi's table of the links between GPUs and network adapters, or None if it
    gives none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "topo", "-m"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LINKS_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Creates a folder while it is examined; folders that did not exist before are removed again.

    Raises UserError if it cannot be created or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # was not created, or a run has begun to use it
                path.rmdir()


def _free_bytes(folder: Path) -> int:
    """Returns the free bytes on the folder's disk."""
    return shutil.disk_usage(folder).free


def _speed_of_disk(folder: Path) -> dict[str, Any]:
    """Measures how many bytes per second are written to the disk and read back. Raises UserError if
    there is too little room.

    What was written is dropped from the page cache before it is read, if the system allows it;
    network file systems may still answer from a cache.
    """
    if _free_bytes(folder) < 2 * BLOCKS * BLOCK:
        raise UserError(f"{folder} has too little room to measure the speed of its file system")
    block = os.urandom(BLOCK)  # neither compressible nor all the same
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(BLOCKS):
            file.write(block)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(BLOCK):
            pass
        read = time.perf_counter() - began
    size = BLOCKS * BLOCK
    return {
        "bytes": size,
        "written_bytes_per_second": size / written,
        "read_bytes_per_second": size / read,
    }
