"""All that the doctor finds out, as `gengram doctor --json` prints it."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

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
"""For nvidia-smi, which never answers where a driver hangs."""
BLOCK = 8 << 20
BLOCKS = 32
"""256 MiB: more than the buffers of disks, and soon written."""


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

    def _ask(self, module: str, *words: str, problem: str, given: str = "") -> dict | None:
        """The answer of a process; if there is none, that is a problem."""
        try:
            return ask(module, *words, given=given)
        except NoAnswer as reason:
            self.problems.append(f"{problem}: {reason}")

    def _devices_of_torch(self) -> dict | None:
        found = self._ask("machine", "devices", problem="torch does not work here")
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

    def _measured(self, layout: Layout | None) -> dict | None:
        if self.found["devices"] is None:
            return None
        several = layout is None or layout.world_size > 1
        return {
            "matrix_product": self._ask("machine", "product", problem="torch cannot multiply here"),
            "all_reduce": self._all_reduce(several),
        }

    def _all_reduce(self, needed: bool) -> dict | None:
        """Between two processes. needed: the run has several."""
        with tempfile.TemporaryDirectory() as folder:
            meeting = str(Path(folder) / "meeting")
            try:
                return ask_together(
                    "machine", [["all_reduce", str(rank), "2", meeting] for rank in (0, 1)]
                )[0]
            except NoAnswer as reason:
                if needed:
                    self.problems.append(f"two processes cannot add up numbers: {reason}")


def _listed_devices() -> dict:
    """What machine.py says of devices, as far as it is known without torch."""
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


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, for as long as it is looked at; what was not there before goes again.

    Raises UserError where it cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # never made, or a run has begun to use it
                path.rmdir()


def _free_bytes(folder: Path) -> int:
    """Free bytes."""
    return shutil.disk_usage(folder).free


def _speed_of_disk(folder: Path) -> dict:
    """Bytes a second, written to the disk itself and read back. Raises UserError if there is too
    little room.

    What was written is dropped from memory before it is read, where the system allows it; network
    file systems may still answer from theirs.
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
