"""How long a training step waits for its samples, and what reading them costs in memory.

    python benchmarks/data_loading.py FOLDER [FOLDER ...] [--out FILE]

FOLDERs are data sets that gengram-data built; several are blended in equal shares. A step here is
a sleep in place of each microbatch's work. It is measured with the files in the page cache, and
cold, when they were dropped from it, with 0 to 4 reading processes; then how much of the files is
in memory twice when two processes read all of it, and what the order of 25 million samples takes.

On a machine with other work start it with `chrt -f 5`, or it measures how long it waits for a core.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.data_set import read_manifest
from gengram_megatron.engine.data.run_data import RunData
from gengram_megatron.engine.data.samples import BlendOrder, FragmentDataset

SAMPLES = 25_066_252  # of the paper's 200 B token run


def run_data(folders: list[Path], workers: int, microbatches: int) -> RunData:
    """What a run of one process with microbatches of one sample reads."""
    length = read_manifest(folders[0])["settings"]["seq_length"]
    return RunData(
        Config.model_validate(
            {
                "run": {"dir": "unused"},
                "model": {
                    "hidden_size": 64,
                    "num_layers": 1,
                    "num_attention_heads": 1,
                    "attention": "mha",
                    "ffn_hidden_size": 64,
                    "seq_length": length,
                },
                "data": {
                    "blend": [{"path": str(folder), "weight": 1} for folder in folders],
                    "workers": workers,
                },
                "train": {"global_batch_size": microbatches, "steps": 1},
            }
        )
    )


def waits(data: RunData, steps: int, step_seconds: float) -> Iterator[tuple[float, float]]:
    """Seconds that each step waits, and of them those that this thread computed: on a machine
    that others use too, the rest is also theirs. [steps, 2]"""
    with closing(data.training(check_layout(data.config, 1), 0, consumed=0)) as stream:
        for _ in range(steps):
            began_computing = time.thread_time()
            next(stream)
            yield stream.pop_seconds_waited(), time.thread_time() - began_computing
            time.sleep(step_seconds)


def measure_waits(
    folders: list[Path], workers: int, cold: bool, steps: int, step_seconds: float, micro: int
) -> dict:
    """The first step starts the reading processes and is told apart."""
    for folder in folders:
        _read_or_drop(folder / "train.bin", cold)
    data = run_data(folders, workers, micro)
    first, *later = waits(data, steps + 1, step_seconds)
    waited, computed = np.array(later).T
    shares = waited / (waited + step_seconds)
    return {
        "workers": workers,
        "page_cache": "cold" if cold else "warm",
        "share_waiting": round(shares.mean(), 5),
        "share_waiting_median_step": round(np.median(shares), 5),
        "share_waiting_worst_step": round(shares.max(), 5),
        "share_computing": round(computed.mean() / step_seconds, 5),
        "seconds_first_step": round(first[0], 3),
    }


def _read_or_drop(path: Path, drop: bool) -> None:
    """Brings a file into the page cache, or out of it, which needs that nobody has it mapped."""
    with path.open("rb") as file:
        if drop:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while file.read(1 << 24):
                pass


def measure_sharing(folder: Path) -> dict:
    """Two processes that started apart, as ranks do, read all samples. Their resident sets count
    each page in both; their proportional sets divide it by the processes that map it."""
    start = multiprocessing.get_context("spawn")
    done, leave = start.Barrier(3), start.Event()
    ranks = [start.Process(target=_read_all, args=(folder, done, leave)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    done.wait()
    sizes = [_mapped(rank.pid, folder / "train.bin") for rank in ranks]
    leave.set()
    for rank in ranks:
        rank.join()
    return {
        "file_bytes": (folder / "train.bin").stat().st_size,
        "resident_bytes_of_each": [size["Rss"] for size in sizes],
        "proportional_bytes_of_each": [size["Pss"] for size in sizes],
    }


def _read_all(folder: Path, done, leave) -> None:
    fragments = FragmentDataset(folder, "train", read_manifest(folder)["settings"]["seq_length"])
    for index in range(len(fragments)):
        fragments[index].sum()
    done.wait()
    leave.wait()


def _mapped(process: int, path: Path) -> dict[str, int]:
    """Rss and Pss, in bytes, of a process's mapping of a file."""
    sizes, inside = {"Rss": 0, "Pss": 0}, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            inside = line.endswith(str(path.resolve()))
        elif inside and name[:-1] in sizes:
            sizes[name[:-1]] += 1024 * int(words[0])
    return sizes


def measure_order() -> dict:
    """Memory and time of the order of a blend of three sets of 25 million samples each."""
    tracemalloc.start()
    order = BlendOrder([SAMPLES] * 3, [Fraction(1)] * 3, seed=1)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    positions, began, rounds = np.arange(10**7, 10**7 + 1024), time.perf_counter(), 50
    for _ in range(rounds):
        order.samples_at(positions)
    return {
        "samples": 3 * SAMPLES,
        "bytes": held,
        "bytes_of_a_shuffled_index": 3 * SAMPLES * np.dtype(np.int64).itemsize,
        "microseconds_a_sample": round((time.perf_counter() - began) / rounds / 1024 * 1e6, 2),
    }


def machine() -> dict:
    """The processor in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "real_time_priority": os.sched_getscheduler(0) == os.SCHED_FIFO,
        "python": platform.python_version(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", help="built data sets")
    parser.add_argument("--steps", type=int, default=40, help="of each case; default: 40")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--microbatches", type=int, default=16, help="a step; default: 16")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    words = parser.parse_args()
    result = {
        "what": "the share of a training step that waits for samples",
        "machine": machine(),
        "samples": [len(one.train) for one in run_data(words.folders, 0, 1).sets],
        "seq_length": read_manifest(words.folders[0])["settings"]["seq_length"],
        "step_seconds": words.step_seconds,
        "microbatches_a_step": words.microbatches,
        "steps": words.steps,
        "waiting": [
            measure_waits(
                words.folders, workers, cold, words.steps, words.step_seconds, words.microbatches
            )
            for workers in (0, 1, 2, 4)
            for cold in (False, True)
        ],
        "two_processes": measure_sharing(words.folders[0]),
        "order": measure_order(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if words.out:
        words.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
