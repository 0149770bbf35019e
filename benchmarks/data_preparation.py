"""From FASTA to a finished data set: gengram-data build against JSON lines and SentencePiece.

    python benchmarks/data_preparation.py [--fasta PATH_OR_URL] [--copies 16] [--repeats 5]
                                          [--out FILE] [KEY=VALUE ...]

(Named data_prep.py, it would hide the package of that name from the programs beside it.)

Each copy of the DNA is a source, a file of its own. Timed are whole commands, started as processes,
on plain and on gzip files; in each repeat all take turns, so that a noisy machine is noisy for all,
and a ratio is the median of the ratios within the repeats. The pipeline, which takes minutes for
what the build does in seconds, gets the first --pipeline-copies of the files; ratios are of bases a
second. KEY=VALUE words go to the build. Without --fasta, the DNA in sample_data is repeated up to
--mbp megabases a copy.

- build: `gengram-data build` of all fragments; start: the same of a hundred fragments
- pipeline: benchmarks/json_pipeline.py; tokenize: its second half, Megatron's tool, alone
- memory: the largest sum of the resident memory of the command and its children, shared pages
  counted for each of them
- projection: the paper's 145 assemblies at the build's rate without its start, by cores, and no
  faster than one core hashes the data set

The files are in the page cache: what is measured is the work, not a disk.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import dnaio
import psutil
import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
SAMPLES = sorted((HERE.parent / "sample_data").glob("*.fa.gz"))
LINE = 60  # bases, as in NCBI's and Ensembl's files
ASSEMBLIES, ASSEMBLY_BASES = 145, 3.1e9
PROJECTED_CORES = (2, 16, 64)
KINDS = ("plain", "gzip")


def main() -> None:
    """Write the files, measure, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fasta", help="path or URL of real DNA, compressed or not")
    parser.add_argument("--mbp", type=float, default=63, help="megabases a copy without --fasta")
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--pipeline-copies", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="the measurements as JSON")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_prep_") as folder:
        result = measure(Path(folder), arguments)
    report(result)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    """All measurements, as the file has them."""
    dna = read_dna(arguments.fasta, int(arguments.mbp * 1e6), folder)
    files = write_sources(folder, dna, arguments.copies)
    short = write_sources(folder / "short", dna[: 100 * arguments.seq_length], 1)
    console = Console(stderr=True)
    runs: list[dict[str, dict[str, float]]] = []
    for number in range(arguments.repeats):
        run = {"start": build(folder, short["plain"], arguments)}
        for kind in KINDS:
            console.print(f"repeat {number + 1} of {arguments.repeats}: {kind}")
            run[f"build {kind}"] = build(folder, files[kind], arguments)
            fewer = files[kind][: arguments.pipeline_copies]
            run[f"pipeline {kind}"] = pipeline(folder, fewer, arguments)
        runs.append(run)
    bases = len(dna) * arguments.copies
    pipeline_bases = len(dna) * min(arguments.copies, arguments.pipeline_copies)
    return {
        "what": "seconds and memory from FASTA to a finished data set",
        "device": device(),
        "dna": "sample_data, repeated" if arguments.fasta is None else Path(arguments.fasta).name,
        "sources": arguments.copies,
        "bases": bases,
        "pipeline_bases": pipeline_bases,
        "seq_length": arguments.seq_length,
        "words": arguments.words,
        "runs": runs,
        "medians": medians(runs, bases, pipeline_bases),
    }


def read_dna(fasta: str | None, bases: int, folder: Path) -> str:
    """The bases of a file's records, or of the shipped ones repeated, in one piece."""
    if fasta is None:
        shipped = "".join(sequences(SAMPLES))
        return (shipped * (bases // len(shipped) + 1))[:bases]
    path = Path(fasta)
    if "://" in fasta:
        path = folder / fasta.rsplit("/", 1)[-1]
        with urlopen(fasta) as answer, path.open("wb") as file:
            shutil.copyfileobj(answer, file)
    return "".join(sequences([path]))


def sequences(paths: list[Path]) -> Iterator[str]:
    """The bases of every record of some FASTA files."""
    for path in paths:
        with dnaio.open(path, fileformat="fasta") as reader:
            for record in reader:
                yield record.sequence


def write_sources(folder: Path, dna: str, copies: int) -> dict[str, list[Path]]:
    """The DNA as so many sources, plain and gzip, under sequence names of their own."""
    files: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    folder.mkdir(exist_ok=True)
    lines = "\n".join(dna[start : start + LINE] for start in range(0, len(dna), LINE))
    for number in range(copies):
        plain, packed = folder / f"copy{number}.fa", folder / f"copy{number}.fa.gz"
        plain.write_text(f">copy{number}\n{lines}\n")
        with plain.open("rb") as file, gzip.open(packed, "wb", compresslevel=6) as out:
            shutil.copyfileobj(file, out)
        files["plain"].append(plain)
        files["gzip"].append(packed)
    return files


def build(folder: Path, files: list[Path], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of `gengram-data build`."""
    config, output = folder / "build.yaml", folder / "built"
    sources = {path.name.split(".")[0]: {"fasta": str(path)} for path in files}
    settings = {
        "output": str(output),
        "seq_length": arguments.seq_length,
        "max_n_fraction": 1.0,
        "groups": {"all": {"sources": sources}},
    }
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "data_prep", "build", str(config), *arguments.words]
    shutil.rmtree(output, ignore_errors=True)  # of the run before
    measured, _ = run_measured(command)
    return measured


def pipeline(folder: Path, files: list[Path], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of the pipeline, and the seconds of its halves."""
    output = folder / "pipeline"
    command = [sys.executable, str(HERE / "json_pipeline.py"), *map(str, files)]
    command += ["--out", str(output), "--seq-length", str(arguments.seq_length)]
    measured, printed = run_measured([*command, "--workers", str(cores())])
    return {**measured, **json.loads(printed.splitlines()[-1])}


def run_measured(command: list[str]) -> tuple[dict[str, float], str]:
    """Run a command to its end: its seconds, its peak memory in bytes, and what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    start = time.perf_counter()
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    memory = Memory(running.pid)
    memory.start()
    printed, _ = running.communicate()
    seconds = time.perf_counter() - start
    memory.join()
    if running.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return {"seconds": seconds, "memory": memory.peak}, printed


class Memory(threading.Thread):
    """Watches the resident memory of a process and its children until it ends."""

    INTERVAL = 0.05  # seconds

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.peak = 0  # bytes
        self._process = psutil.Process(pid)

    def run(self) -> None:
        """Look again and again."""
        while True:
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(_resident, family)))
            time.sleep(self.INTERVAL)


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def medians(runs: list[dict[str, dict[str, float]]], bases: int, pipeline_bases: int) -> dict:
    """Medians over the repeats: rates in bases a second, their ratios, memory in bytes."""
    start = median(run["start"]["seconds"] for run in runs)
    share = pipeline_bases / bases
    found: dict = {"start_seconds": start}
    for kind in KINDS:
        ours, theirs = f"build {kind}", f"pipeline {kind}"
        found[kind] = {
            "build_bases_per_second": median(bases / run[ours]["seconds"] for run in runs),
            "build_without_start": _rate(
                bases, median(run[ours]["seconds"] for run in runs) - start
            ),
            "pipeline_bases_per_second": median(
                pipeline_bases / run[theirs]["seconds"] for run in runs
            ),
            "tokenize_bases_per_second": median(
                pipeline_bases / run[theirs]["tokenize"] for run in runs
            ),
            "times_the_pipeline": median(
                run[theirs]["seconds"] / share / run[ours]["seconds"] for run in runs
            ),
            "times_tokenize_alone": median(
                run[theirs]["tokenize"] / share / run[ours]["seconds"] for run in runs
            ),
            "build_memory": max(run[ours]["memory"] for run in runs),
            "pipeline_memory": max(run[theirs]["memory"] for run in runs),
        }
    return found


def _rate(bases: int, seconds: float) -> float | None:
    """Bases a second; None where so few were built that they drown in the noise of the start."""
    return bases / seconds if seconds > 0 else None


def hours(rate: float, cores_measured: int, target: int) -> float:
    """Hours for all assemblies on `target` cores, of a rate in bases a second on those measured,
    if the rate grows with the cores: each source is the work of one of them. But one core hashes
    the data set, a byte a base if all are taken."""
    return ASSEMBLIES * ASSEMBLY_BASES / min(rate * target / cores_measured, hash_rate()) / 3600


@cache
def hash_rate() -> float:
    """Bytes a second of SHA-256 on one core."""
    digest, block, blocks = hashlib.sha256(), bytes(2**20), 256
    began = time.perf_counter()
    for _ in range(blocks):
        digest.update(block)
    return blocks * len(block) / (time.perf_counter() - began)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def device() -> dict:
    """The machine in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "python": platform.python_version(),
    }


def report(result: dict) -> None:
    """The tables on the screen."""
    console, of = Console(), result["medians"]
    device, count = result["device"], result["device"]["cores"]
    title = f"{result['bases'] / 1e6:.0f} Mbp in {result['sources']} files on {count} cores"
    table = Table(title=f"{title} ({device['cpu']}), medians of {len(result['runs'])}")
    for heading in ("", *KINDS):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {
        "gengram-data build, Mbp/s": ("build_bases_per_second", 1e6, "{:.1f}"),
        "the same without its start": ("build_without_start", 1e6, "{:.1f}"),
        "JSON lines and SentencePiece, Mbp/s": ("pipeline_bases_per_second", 1e6, "{:.1f}"),
        "its tokenizing half alone": ("tokenize_bases_per_second", 1e6, "{:.1f}"),
        "times as fast as both halves": ("times_the_pipeline", 1, "{:.1f}"),
        "times as fast as tokenizing": ("times_tokenize_alone", 1, "{:.1f}"),
        "memory of the build, MB": ("build_memory", 1e6, "{:.0f}"),
        "memory of the pipeline, MB": ("pipeline_memory", 1e6, "{:.0f}"),
    }
    for name, (key, unit, form) in rows.items():
        table.add_row(name, *(_cell(of[kind][key], form, unit) for kind in KINDS))
    for target in PROJECTED_CORES:
        rates = [of[kind]["build_without_start"] for kind in KINDS]
        times = [rate and hours(rate, count, target) for rate in rates]
        name = f"{ASSEMBLIES} assemblies on {target} cores, hours"
        table.add_row(name, *(_cell(own, "{:.2f}") for own in times))
    console.print(table)


def _cell(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else form.format(value / unit)


if __name__ == "__main__":
    main()
