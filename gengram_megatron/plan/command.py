"""The command `gengram plan`."""

import json
from dataclasses import asdict
from math import lcm
from typing import Annotated

import typer

from gengram_megatron.config.arguments import ConfigFile, Overrides
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.plan import plan as work_out
from gengram_megatron.plan.show import show, show_suggestions
from gengram_megatron.plan.suggest import suggest as find_layouts
from gengram_megatron.plan.time import GPU_TFLOPS, UTILISATION, Speed

Gpus = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        "--gpus",
        min=1,
        help="Processes of the run, one a GPU; default: as few as the layout needs.",
    ),
]
Gigabytes = Annotated[
    float, typer.Option("--memory", min=0, help="Memory of one GPU, in GB of 10^9 bytes.")
]
Utilisation = Annotated[
    float, typer.Option(min=0.01, max=1, help="Share of the GPUs' peak that the arithmetic takes.")
]
Tflops = Annotated[
    float,
    typer.Option("--gpu-tflops", min=0.001, help="Peak of one GPU; default: H100, dense bf16."),
]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Gpus = None,
    memory: Gigabytes = 80,
    utilisation: Utilisation = UTILISATION,
    gpu_tflops: Tflops = GPU_TFLOPS,
    suggest: Annotated[
        bool,
        typer.Option(
            "--suggest",
            help="Rank the layouts that fit: the fastest first, of "
            "those about as fast (5 %) the one with the fewest changes.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what a run will be, without starting it.

    Steps, tokens and parameters; memory of the fullest rank by kind; FLOPs, bytes that are sent, and
    time; of Gengram's tables, how each is split over the ranks, and why; and what to think about.

    \b
      gengram plan configs/smoke/cpu.yaml
      gengram plan my_run.yaml --nproc 64 'model.gengram.kmer_sizes=[1,2,3,4,5,6,12]'
      gengram plan configs/pretrain_200b_8k/gengram_window_21.yaml --suggest --gpus 256

    Parameters are exact. Memory is an estimate, on small models on the CPU 1 % too low to 5 % too
    high, not yet compared with a GPU; it leaves out what CUDA, NCCL and torch's allocator take for
    themselves, a few GB. The time of a run is its FLOPs at the utilisation that you give;
    --suggest adds waiting and communication to it, to compare layouts.
    """
    loaded, speed = load_config(config, overrides or [], Config), Speed(utilisation, gpu_tflops)
    if suggest:
        _suggest(loaded, nproc, memory, speed, as_json)
        return
    layout = check_layout(loaded, nproc or smallest_world(loaded))
    found = work_out(loaded, layout, speed, memory)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


def smallest_world(config: Config) -> int:
    """Processes that a layout takes at least."""
    parallel = config.parallel
    copy = parallel.tensor * parallel.context
    experts = (parallel.expert_tensor or parallel.tensor) * parallel.expert
    return parallel.pipeline * lcm(copy, experts)


def _suggest(
    config: Config, gpus: int | None, gigabytes: float, speed: Speed, as_json: bool
) -> None:
    if gpus is None:
        raise UserError("--suggest needs --gpus, the number of GPUs of the run")
    found = find_layouts(config, gpus, gigabytes, speed)
    if as_json:
        rows = [{**asdict(one), "seconds_per_step": one.time.total} for one in found]
        print(json.dumps(rows, indent=1))
    else:
        show_suggestions(found, gpus, gigabytes)
