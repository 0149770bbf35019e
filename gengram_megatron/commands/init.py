"""The command `gengram init`: a first config of a run or of a data set, sized to this machine."""

import json
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import psutil
import typer

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import check_tree
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import inline_yaml, parse_yaml
from gengram_megatron.errors import UserError
from gengram_megatron.files import check_writable
from gengram_megatron.gpus import nvidia_gpus
from gengram_megatron.plan import plan
from gengram_megatron.plan.time import Speed

FASTA = re.compile(r"\.(fa|fasta|fna)(\.(gz|bgz|bz2|xz|zst))?$")
COMPRESSION = 4
"""About so many bases are in a byte of a compressed FASTA file."""
FRAGMENTS = 1000
"""Fragments that a starter data set has at least, or else shorter ones are cut."""
SHARE_OF_MEMORY = {"gpu": 0.6, "cpu": 0.25}
"""Of a device's memory, what the estimate of a run may be: it leaves out what CUDA and torch's
allocator take, and the memory of a host belongs to others too."""
BF16_CAPABILITY = 8.0
"""Of GPUs whose arithmetic knows bf16: Ampere and later."""


class Kind(StrEnum):
    """What a starter config is for."""

    run = "run"
    data = "data"


def init(
    kind: Annotated[
        Kind,
        typer.Argument(
            metavar="run|data", help="Whether to write the config of a run or of a data set."
        ),
    ] = Kind.run,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="FASTA files of a data set, or folders of them; or the data set that a run reads; "
            "without them, what lies in the current folder or below genomes/ and datasets/.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="The file to write, a new one; my_run.yaml or my_data.yaml.",
        ),
    ] = None,
) -> None:
    """Write a commented config to begin with.

    \b
      gengram init data sample_data/*.fa.gz
      gengram-data build my_data.yaml
      gengram init run datasets/my_data
      gengram train my_run.yaml

    The config of a run takes its model and batch from the memory of the GPUs here, as
    `gengram plan` estimates it, and its sequence length from the data set. Nothing is overwritten.
    """
    output = output or Path(f"my_{kind}.yaml")
    if output.exists():
        raise UserError(f"{output} is there already; give --output another name")
    check_writable(output, "--output")
    machine = find_machine()
    if kind == Kind.data:
        text = data_text(output, _fasta_files(paths or [Path(), Path("genomes")]), machine)
        then = f"gengram-data build {output}"
    else:
        text = run_text(output, _one_data_set(paths or _data_sets_here()), machine)
        then = f"gengram {'launch' if machine.gpus > 1 else 'train'} {output}"
    with output.open("x") as file:
        file.write(text)
    print(f"wrote {output}; next: {then}")


@dataclass(frozen=True)
class Machine:
    """What a run is sized to. gpus: their number, 0 where all computes on the CPU.
    memory: bytes of the smallest GPU, or of the host. bf16: whether it computes in bf16 fast."""

    gpus: int
    memory: int
    bf16: bool

    @property
    def usable(self) -> int:
        """Bytes that the estimate of a run may be."""
        return int(self.memory * SHARE_OF_MEMORY["gpu" if self.gpus else "cpu"])

    def __str__(self) -> str:
        size = f"{self.memory / 1e9:.0f} GB"
        if not self.gpus:
            return f"a CPU with {size} of memory"
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)} of {size}"


def find_machine() -> Machine:
    """The GPUs of this machine, or else its CPU."""
    gpus = nvidia_gpus()
    if not gpus:
        return Machine(0, psutil.virtual_memory().total, bf16=False)
    bf16 = all(float(gpu.compute_capability) >= BF16_CAPABILITY for gpu in gpus)
    return Machine(len(gpus), min(gpu.bytes for gpu in gpus), bf16)


@dataclass(frozen=True)
class Size:
    """A model to begin with. experts: None for a dense one. tokens: of a step."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    experts: int | None
    gengram_layers: list[int]
    gengram_dim: int
    lr: float
    tokens: int
    steps: int


SIZES = [
    # The paper's mixture of experts, and its dense model, with memory in its best layers.
    Size(1024, 12, 16, 4096, 8, [3, 6, 10], 1024, 1e-4, 1 << 19, 1000),
    Size(1280, 12, 16, 5120, None, [3, 6, 10], 1024, 1e-4, 1 << 19, 1000),
    Size(512, 8, 8, 2048, None, [2, 4, 6], 256, 5e-4, 1 << 17, 1000),
    # The smoke run's.
    Size(128, 4, 4, 256, 4, [2, 3], 64, 2e-3, 1 << 12, 100),
]
"""Largest first; on a CPU only the last is ever chosen."""


def run_text(output: Path, data: Path, machine: Machine) -> str:
    """The config of a run on a data set: the largest model, with the largest microbatch, that the
    estimate says this machine holds."""
    length, samples = _facts(data)
    for size in SIZES if machine.gpus else SIZES[-1:]:
        ranks = max(machine.gpus, 1)
        each = 1 << max(size.tokens // length // ranks, 1).bit_length() - 1  # a power of two
        while each > 1 and each * ranks > samples:
            each //= 2
        micro = each if machine.gpus else min(each, 4)
        while True:
            text = _run_text(output, data, machine, size, (length, samples), each, micro)
            if _needs(text, ranks, machine) <= machine.usable:
                return text.replace(PARAMETERS, f"{_parameters(text, ranks):,}")
            if micro == 1:
                break
            micro //= 2
    raise UserError(
        f"not even a small model of {length:,} bases a sample fits in the memory of {machine}; "
        "build a data set with a smaller seq_length"
    )


PARAMETERS = "PARAMETERS"
"""Stands in the text of a run until they are counted."""


def _planned(text: str, ranks: int, on_gpu: bool) -> dict:
    config = check_tree(parse_yaml(text, "gengram init"), Path("gengram init"), Config)
    return plan(config, check_layout(config, ranks), Speed(), float("inf"), on_gpu=on_gpu)


def _needs(text: str, ranks: int, machine: Machine) -> int:
    planned = _planned(text, ranks, bool(machine.gpus))
    return planned["memory_bytes_per_rank"]["total"]


def _parameters(text: str, ranks: int) -> int:
    return _planned(text, ranks, on_gpu=False)["parameters"]["total"]


def _facts(data: Path) -> tuple[int, int]:
    """Bases a sample and training samples of a built data set."""
    try:
        manifest = json.loads((data / "manifest.json").read_text())
        length = manifest["settings"]["seq_length"]
        return length, manifest["files"]["train.bin"]["bytes"] // (length + 1)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{data} is not a data set: it has no manifest.json that can be read; "
            "`gengram init data` begins one"
        ) from None


def _run_text(
    output: Path,
    data: Path,
    machine: Machine,
    size: Size,
    data_facts: tuple[int, int],
    each: int,
    micro: int,
) -> str:
    """each: samples of a step on each rank; micro: of them, those of one forward pass."""
    length, samples = data_facts
    batch = each * max(machine.gpus, 1)
    steps = max(min(size.steps, 2 * samples // batch), 1)
    quarter = max(steps // 4, 1)
    launch = "" if machine.gpus < 2 else f"#   gengram launch {output}  trains on all GPUs\n"
    processes = max(machine.gpus, 1)
    experts = "null" if size.experts is None else size.experts
    precision = "bf16" if machine.bf16 else "fp32"
    why = "of weights and activations"
    if not machine.bf16:
        why += "; not bf16, which CPUs and older GPUs may emulate slowly"
    of_expert = " of each expert" if size.experts else ""
    one_each = ": one for each GPU" if machine.gpus else ""
    slurm = "" if machine.gpus else "  slurm: {gpus: 0}\t# asked of Slurm by --slurm\n"
    return _aligned(f"""\
# A run for {machine}, to begin with. `gengram config --keys` lists all keys.
#   gengram plan {output}  says what it needs, and starts nothing
#   gengram train {output}  trains in one process; after an interruption it goes on
{launch}
run:
  dir: {inline_yaml(f"runs/{output.stem}")}\t# relative to the current folder; a run of its own each
  seed: 1234\t# decides the initial weights and the order of the samples

model:\t# {PARAMETERS} parameters
  hidden_size: {size.hidden}
  num_layers: {size.layers}
  num_attention_heads: {size.heads}\t# two of them share a key-value head
  ffn_hidden_size: {size.ffn}\t# SwiGLU width{of_expert}
  num_experts: {experts}\t# null: a dense model
  seq_length: {length}\t# bases a sample, those of the data set
  init_std: {0.02 if size.hidden < 1024 else 0.01}\t# standard deviation of the weights at the start
  gengram:
    enabled: true\t# false: the same model without memory, to compare with
    layers: {size.gengram_layers}\t# decoder layers with memory, from 1
    dim: {size.gengram_dim}\t# columns of each table of k-mers
    window: 21\t# tokens of a window; null: only the k-mer that ends at each token

data:
  path: {inline_yaml(str(data))}\t# what gengram-data build wrote, relative to the current folder

optimizer:
  lr: {size.lr:g}\t# the peak
  min_lr: {size.lr / 10:g}\t# where the cosine ends
  warmup_fraction: 0.1\t# of all samples
  beta2: 0.95\t# of Adam; runs of many thousand steps may take 0.999, as the paper's do

train:
  global_batch_size: {batch}\t# samples a step, over all processes
  micro_batch_size: {micro}\t# samples of one forward pass; more of them need more memory
  steps: {steps}\t# {steps * batch:,} samples, and the data set has {samples:,} to train on
  precision: {precision}\t# {why}
  validation_interval: {quarter}\t# steps between validations
  validation_samples: 256\t# of each validation, at most all there are

checkpoint:
  interval: {quarter}\t# steps between checkpoints; after an interruption the newest counts
  keep: 2\t# newest checkpoints that stay

launch:
  processes: {processes}\t# of `gengram launch`{one_each}
{slurm}""")


def _aligned(text: str) -> str:
    """A text whose comments, which follow a tab, stand in one column where there is room."""
    lines = (line.split("\t", 1) for line in text.splitlines())
    return "".join(
        f"{line[0]:26} {line[1]}\n" if len(line) > 1 else f"{line[0]}\n" for line in lines
    )


def data_text(output: Path, files: list[Path], machine: Machine) -> str:
    """The config of a data set from FASTA files."""
    bases = sum(
        path.stat().st_size * (1 if path.suffix in (".fa", ".fasta", ".fna") else COMPRESSION)
        for path in files
    )
    length = 8192 if machine.gpus else 512
    while length > 64 and bases // length < FRAGMENTS:
        length //= 2
    folder = output.absolute().parent
    sources = "".join(
        f"      {name}:\n        fasta: {inline_yaml(os.path.relpath(path, folder))}\n"
        for name, path in _named(files).items()
    )
    return _aligned(f"""\
# A data set to begin with. `gengram-data build --help` explains all keys.
#   gengram-data build {output}

output: {inline_yaml(f"datasets/{output.stem}")}\t# the folder to write, relative to the current folder
seq_length: {length}\t# bases a fragment, and so a training sample
seed: 1234\t# decides what a mix of groups leaves out
validation: 0.05\t# share of each source held out for validation, in blocks spread over it
max_n_fraction: 0.1\t# fragments with a larger share of N are dropped
reverse_complement: 0\t# share of the fragments written as the other strand
groups:\t# several groups are mixed by their weights
  all:
    weight: 1
    sources:\t# a name for each file; fasta is relative to this file
{sources}""")


def _named(files: list[Path]) -> dict[str, Path]:
    """A name for each file: its own without endings, with a number where that is not enough."""
    named: dict[str, Path] = {}
    for path in files:
        own = re.sub(r"[^A-Za-z0-9_-]+", "_", FASTA.sub("", path.name)).strip("_") or "source"
        name, number = own, 2
        while name in named:
            name, number = f"{own}_{number}", number + 1
        named[name] = path
    return named


def _fasta_files(paths: list[Path]) -> list[Path]:
    """The files among these paths, and those in the folders among them whose names say FASTA."""
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(path.iterdir())
            found += [one for one in inside if FASTA.search(one.name) and one.is_file()]
        elif path.is_file():
            found.append(path)
        elif path != Path("genomes"):
            raise UserError(f"there is no FASTA file {os.path.abspath(path)}")
    if not found:
        raise UserError(
            f"there is no FASTA file in {', '.join(map(os.path.abspath, paths))}; name some, as in "
            "`gengram init data genomes/chm13.fa.gz`"
        )
    return found


def _data_sets_here() -> list[Path]:
    found = sorted(path.parent for path in Path("datasets").glob("*/manifest.json"))
    if not found:
        raise UserError(
            "there is no data set in datasets/; name its folder, as in `gengram init run "
            "datasets/mine`, or begin one with `gengram init data`"
        )
    return found


def _one_data_set(found: list[Path]) -> Path:
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UserError(f"a run to begin with reads one data set; name one of {names}")
    return found[0]
