"""The command `gengram init`: a first config of a run or of a data set, sized to this machine."""

import json
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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
"""Approximate number of bases per byte of a compressed FASTA file."""
FRAGMENTS = 1000
"""Minimum number of fragments of a starter data set; with fewer bases, fragments are shorter."""
SHARE_OF_MEMORY = {"gpu": 0.6, "cpu": 0.25}
"""Share of a device's memory that the estimate of a run may reach. The estimate leaves out what
CUDA and torch's allocator need, and other programs use the host's memory too."""
BF16_CAPABILITY = 8.0
"""Lowest compute capability with bf16 arithmetic, that of Ampere."""


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
            help="For data: FASTA files, or folders of them; default: those in the current folder "
            "and in genomes/. For run: the folder of its data set; default: the one in datasets/.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="The new file to write; default: my_run.yaml or my_data.yaml.",
        ),
    ] = None,
) -> None:
    """Write a commented config to start from.

    \b
      gengram init data sample_data/*.fa.gz
      gengram-data build my_data.yaml
      gengram init run datasets/my_data
      gengram train my_run.yaml

    For a run, the model and the batch are chosen to fit into the memory of this machine's GPUs, as
    estimated by `gengram plan`, and the sequence length is that of the data set. Nothing is
    overwritten.
    """
    output = output or Path(f"my_{kind}.yaml")
    if output.exists():
        raise UserError(f"{output} already exists; give --output another name")
    check_writable(output, "--output")
    machine = find_machine()
    if kind == Kind.data:
        text = data_text(output, _fasta_files(paths or [Path(), Path("genomes")]), machine)
        next_command = f"gengram-data build {output}"
    else:
        text = run_text(output, _one_data_set(paths or _data_sets_here()), machine)
        next_command = f"gengram {'launch' if machine.gpus > 1 else 'train'} {output}"
    with output.open("x") as file:
        file.write(text)
    print(f"wrote {output}; next: {next_command}")


@dataclass(frozen=True)
class Machine:
    """The machine that a starter config is made for.

    Attributes:
        gpus: number of GPUs; 0 if everything computes on the CPU.
        memory: bytes of memory of the smallest GPU, or of the host without GPUs.
        bf16: whether bf16 arithmetic is fast.
    """

    gpus: int
    memory: int
    bf16: bool

    @property
    def usable(self) -> int:
        """Bytes of memory per device that the estimate of a run may reach."""
        return int(self.memory * SHARE_OF_MEMORY["gpu" if self.gpus else "cpu"])

    def __str__(self) -> str:
        size = f"{self.memory / 1e9:.0f} GB"
        if not self.gpus:
            return f"a CPU with {size} of memory"
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)} of {size}"


def find_machine() -> Machine:
    """Returns the GPUs of this machine, or its CPU if it has none."""
    gpus = nvidia_gpus()
    if not gpus:
        return Machine(0, psutil.virtual_memory().total, bf16=False)
    bf16 = all(float(gpu.compute_capability) >= BF16_CAPABILITY for gpu in gpus)
    return Machine(len(gpus), min(gpu.bytes for gpu in gpus), bf16)


@dataclass(frozen=True)
class Size:
    """A starter model and its training.

    Attributes:
        experts: number of experts; None for a dense model.
        tokens: tokens per step.
    """

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
    # The paper's mixture of experts and dense model, with Gengram in the paper's best layers.
    Size(1024, 12, 16, 4096, 8, [3, 6, 10], 1024, 1e-4, 1 << 19, 1000),
    Size(1280, 12, 16, 5120, None, [3, 6, 10], 1024, 1e-4, 1 << 19, 1000),
    Size(512, 8, 8, 2048, None, [2, 4, 6], 256, 5e-4, 1 << 17, 1000),
    # The model of the smoke run.
    Size(128, 4, 4, 256, 4, [2, 3], 64, 2e-3, 1 << 12, 100),
]
"""Starter models, largest first. On a CPU only the last one is used."""


def run_text(output: Path, data: Path, machine: Machine) -> str:
    """Returns the config of a run on a data set, with the largest model and microbatch that fit on
    this machine according to the estimate of `gengram plan`."""
    length, samples = _data_set_size(data)
    for size in SIZES if machine.gpus else SIZES[-1:]:
        ranks = max(machine.gpus, 1)
        per_rank = 1 << max(size.tokens // length // ranks, 1).bit_length() - 1  # a power of two
        while per_rank > 1 and per_rank * ranks > samples:
            per_rank //= 2
        micro = per_rank if machine.gpus else min(per_rank, 4)
        while True:
            text = _run_text(output, data, machine, size, (length, samples), per_rank, micro)
            if _memory_needed(text, ranks, machine) <= machine.usable:
                return text.replace(PARAMETERS, f"{_parameters(text, ranks):,}")
            if micro == 1:
                break
            micro //= 2
    raise UserError(
        f"not even a small model with {length:,} bases per sample fits in the memory of {machine}; "
        "build a data set with a smaller seq_length"
    )


PARAMETERS = "PARAMETERS"
"""Placeholder in the text of a run for its number of parameters."""


def _planned(text: str, ranks: int, on_gpu: bool) -> dict[str, Any]:
    config = check_tree(parse_yaml(text, "gengram init"), Path("gengram init"), Config)
    return plan(config, check_layout(config, ranks), Speed(), float("inf"), on_gpu=on_gpu)


def _memory_needed(text: str, ranks: int, machine: Machine) -> int:
    needed: int = _planned(text, ranks, bool(machine.gpus))["memory_bytes_per_rank"]["total"]
    return needed


def _parameters(text: str, ranks: int) -> int:
    parameters: int = _planned(text, ranks, on_gpu=False)["parameters"]["total"]
    return parameters


def _data_set_size(data: Path) -> tuple[int, int]:
    """Returns the bases per sample and the number of training samples of a built data set."""
    try:
        manifest = json.loads((data / "manifest.json").read_text())
        length = manifest["settings"]["seq_length"]
        return length, manifest["files"]["train.bin"]["bytes"] // (length + 1)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{data} is not a data set: it has no manifest.json that can be read; "
            "start with `gengram init data` to build one"
        ) from None


def _run_text(
    output: Path,
    data: Path,
    machine: Machine,
    size: Size,
    data_set_size: tuple[int, int],
    per_rank: int,
    micro: int,
) -> str:
    """Returns the text of a run's config.

    Args:
        data_set_size: bases per sample and number of training samples of the data set.
        per_rank: samples per step on each rank.
        micro: samples per forward pass on each rank.
    """
    length, samples = data_set_size
    batch = per_rank * max(machine.gpus, 1)
    steps = max(min(size.steps, 2 * samples // batch), 1)
    quarter = max(steps // 4, 1)
    launch = "" if machine.gpus < 2 else f"#   gengram launch {output}  trains on all GPUs\n"
    processes = max(machine.gpus, 1)
    experts = "null" if size.experts is None else size.experts
    precision = "bf16" if machine.bf16 else "fp32"
    precision_comment = "of weights and activations"
    if not machine.bf16:
        precision_comment += "; not bf16, which CPUs and older GPUs may emulate slowly"
    of_expert = " of each expert" if size.experts else ""
    per_gpu = ": one for each GPU" if machine.gpus else ""
    slurm = "" if machine.gpus else "  slurm: {gpus: 0}\t# GPUs to request with --slurm\n"
    return _aligned(f"""\
# A starter run for {machine}. `gengram config --keys` lists all keys.
#   gengram plan {output}  shows what it needs, without starting it
#   gengram train {output}  trains in one process, and resumes after an interruption
{launch}
run:
  dir: {inline_yaml(f"runs/{output.stem}")}\t# relative to the current folder; a new folder for each run
  seed: 1234\t# decides the initial weights and the order of the samples

model:\t# {PARAMETERS} parameters
  hidden_size: {size.hidden}
  num_layers: {size.layers}
  num_attention_heads: {size.heads}\t# two of them share a key-value head
  ffn_hidden_size: {size.ffn}\t# SwiGLU width{of_expert}
  num_experts: {experts}\t# null: a dense model
  seq_length: {length}\t# bases per sample, as in the data set
  init_std: {0.02 if size.hidden < 1024 else 0.01}\t# standard deviation of the initial weights
  gengram:
    enabled: true\t# false: the same model without Gengram, to compare with
    layers: {size.gengram_layers}\t# decoder layers with Gengram, counted from 1
    dim: {size.gengram_dim}\t# columns of each k-mer table
    window: 21\t# tokens in the window; null: only the k-mer that ends at each token

data:
  path: {inline_yaml(str(data))}\t# written by gengram-data build; relative to the current folder

optimizer:
  lr: {size.lr:g}\t# peak learning rate
  min_lr: {size.lr / 10:g}\t# learning rate at the end of the cosine
  warmup_fraction: 0.1\t# share of all samples
  beta2: 0.95\t# of Adam; runs of many thousand steps can use 0.999, like the paper's

train:
  global_batch_size: {batch}\t# samples per step, over all processes
  micro_batch_size: {micro}\t# samples per forward pass; more need more memory
  steps: {steps}\t# {steps * batch:,} samples; the data set has {samples:,} to train on
  precision: {precision}\t# {precision_comment}
  validation_interval: {quarter}\t# steps between validations
  validation_samples: 256\t# samples per validation, at most all

checkpoint:
  interval: {quarter}\t# steps between checkpoints; training resumes from the newest
  keep: 2\t# how many of the newest checkpoints to keep

launch:
  processes: {processes}\t# processes that `gengram launch` starts{per_gpu}
{slurm}""")


def _aligned(text: str) -> str:
    """Replaces the tab before each comment by spaces, so that comments start in one column where
    there is room."""
    lines = (line.split("\t", 1) for line in text.splitlines())
    return "".join(
        f"{line[0]:26} {line[1]}\n" if len(line) > 1 else f"{line[0]}\n" for line in lines
    )


def data_text(output: Path, files: list[Path], machine: Machine) -> str:
    """Returns the config of a data set made of FASTA files."""
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
# A starter data set. `gengram-data build --help` explains all keys.
#   gengram-data build {output}

output: {inline_yaml(f"datasets/{output.stem}")}\t# the folder to write, relative to the current folder
seq_length: {length}\t# bases per fragment; a fragment is one training sample
seed: 1234\t# decides what is left out when groups are mixed
validation: 0.05\t# share of each source held out for validation, in blocks spread over it
max_n_fraction: 0.1\t# fragments with a larger share of N are dropped
reverse_complement: 0\t# share of the fragments written as the other strand
groups:\t# several groups are mixed by their weights
  all:
    weight: 1
    sources:\t# a name for each file; fasta is relative to this file
{sources}""")


def _named(files: list[Path]) -> dict[str, Path]:
    """Returns the files by unique names: the file name without suffixes, with a number appended if
    it occurs more than once."""
    named: dict[str, Path] = {}
    for path in files:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", FASTA.sub("", path.name)).strip("_") or "source"
        name, number = stem, 2
        while name in named:
            name, number = f"{stem}_{number}", number + 1
        named[name] = path
    return named


def _fasta_files(paths: list[Path]) -> list[Path]:
    """Returns the files among these paths, and the files with FASTA suffixes in the folders among
    them."""
    files = []
    for path in paths:
        if path.is_dir():
            entries = sorted(path.iterdir())
            files += [entry for entry in entries if FASTA.search(entry.name) and entry.is_file()]
        elif path.is_file():
            files.append(path)
        elif path != Path("genomes"):
            raise UserError(f"there is no FASTA file {os.path.abspath(path)}")
    if not files:
        raise UserError(
            f"there is no FASTA file in {', '.join(map(os.path.abspath, paths))}; name some, as in "
            "`gengram init data genomes/chm13.fa.gz`"
        )
    return files


def _data_sets_here() -> list[Path]:
    folders = sorted(path.parent for path in Path("datasets").glob("*/manifest.json"))
    if not folders:
        raise UserError(
            "there is no data set in datasets/; name its folder, as in `gengram init run "
            "datasets/mine`, or start with `gengram init data` to build one"
        )
    return folders


def _one_data_set(folders: list[Path]) -> Path:
    if len(folders) > 1:
        names = ", ".join(map(str, folders))
        raise UserError(f"a starter run reads one data set; name one of {names}")
    return folders[0]
