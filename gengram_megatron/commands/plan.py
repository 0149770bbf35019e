"""The command `gengram plan`: prints a plan as tables, or as JSON."""

import json
from dataclasses import asdict
from math import lcm
from typing import Annotated, Any

import typer
from rich.table import Table

from gengram_megatron.config.command_line import ConfigFile, Overrides
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.plan import plan as make_plan
from gengram_megatron.plan.suggest import GB, Suggestion
from gengram_megatron.plan.suggest import suggest as find_layouts
from gengram_megatron.plan.time import GPU_TFLOPS, UTILISATION, Speed
from gengram_megatron.show import print_table, print_text

Gpus = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        "--gpus",
        min=1,
        help="Processes of the run, one per GPU; default: launch.nodes times launch.processes of "
        "the config, or else as few as the layout needs.",
    ),
]
Gigabytes = Annotated[
    float, typer.Option("--memory", min=0, help="Memory of one GPU, in GB of 10^9 bytes.")
]
Utilisation = Annotated[
    float, typer.Option(min=0.01, max=1, help="Share of the GPUs' peak speed that is reached.")
]
Tflops = Annotated[
    float,
    typer.Option(
        "--gpu-tflops", min=0.001, help="Peak speed of one GPU; default: H100, dense bf16."
    ),
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
            help="Rank the layouts that fit, fastest first; among those about as fast (5 %), the "
            "one with the fewest changes comes first.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate what a run needs, without starting it.

    Shows steps, tokens and parameters; memory by kind on the rank that needs most; FLOPs, bytes
    sent and time; how and why each Gengram table is split over the ranks; and warnings.

    \b
      gengram plan configs/smoke/cpu.yaml
      gengram plan my_run.yaml --nproc 64 'model.gengram.kmer_sizes=[1,2,3,4,5,6,12]'
      gengram plan configs/pretrain_200b_8k/gengram_window_21.yaml --suggest --gpus 256

    Parameters are exact. Memory is an estimate: for small models on the CPU it is between 1 % too
    low and 5 % too high; it has not yet been compared with a GPU. It leaves out the few GB that
    CUDA, NCCL and torch's allocator need. The time of a run is that of its FLOPs at the given
    utilisation; --suggest adds pipeline bubbles and communication, to compare layouts.
    """
    loaded, speed = load_config(config, overrides or [], Config), Speed(utilisation, gpu_tflops)
    if suggest:
        _suggest(loaded, nproc, memory, speed, as_json)
        return
    layout = check_layout(loaded, nproc or _launch_world(loaded) or smallest_world(loaded))
    figures = make_plan(loaded, layout, speed, memory)
    if as_json:
        print(json.dumps(figures, indent=1))
    else:
        show(figures)


def _launch_world(config: Config) -> int | None:
    """Returns the number of processes that the section launch starts; None if it does not say."""
    launch = config.launch
    return launch.nodes * launch.processes if launch.processes else None


def smallest_world(config: Config) -> int:
    """Returns the smallest number of processes that the config's layout can run on."""
    parallel = config.parallel
    copy = parallel.tensor * parallel.context
    experts = (parallel.expert_tensor or parallel.tensor) * parallel.expert
    return parallel.pipeline * lcm(copy, experts)


def _suggest(
    config: Config, gpus: int | None, gigabytes: float, speed: Speed, as_json: bool
) -> None:
    if gpus is None:
        raise UserError("--suggest needs --gpus, the number of GPUs of the run")
    suggestions = find_layouts(config, gpus, gigabytes, speed)
    if as_json:
        rows = [
            {**asdict(suggestion), "seconds_per_step": suggestion.time.total}
            for suggestion in suggestions
        ]
        print(json.dumps(rows, indent=1))
    else:
        show_suggestions(suggestions, gpus, gigabytes)


SHOWN = 10
"""Number of layouts that --suggest prints; --json has all."""


def show(plan: dict[str, Any]) -> None:
    """Prints a plan as tables."""
    print_table(_facts(plan))
    stage = plan["memory_bytes_per_rank"]["stage"] + 1
    kinds = {k: v for k, v in plan["memory_bytes_per_rank"].items() if k != "stage"}
    print_table(_bytes(f"Memory of the rank that needs most, in pipeline stage {stage}", kinds))
    sent = {k.replace("_", " "): v for k, v in plan["bytes_sent_per_rank_and_step"].items() if v}
    if sent:
        print_table(_bytes("Sent per step by the rank that sends most", sent))
    if plan["tables"]:
        print_table(_tables(plan))
        projection = plan["projection"]
        print_text(f"Key and value are projected from {projection['of']}: {projection['reason']}")
    for sentence in plan["warnings"]:
        print_text(f"warning: {sentence}")


def _facts(plan: dict[str, Any]) -> Table:
    facts = Table(title="The run", show_header=False)
    facts.add_column("what")
    facts.add_column("number", justify="right")
    for name in ("processes", "steps", "samples", "tokens"):
        facts.add_row(name, f"{plan[name]:,}")
    if plan["samples_trained"] != plan["samples"]:
        facts.add_row("samples, in whole batches", f"{plan['samples_trained']:,}")
    for name, number in plan["parameters"].items():
        facts.add_row(f"parameters, {name}", f"{number:,}")
    facts.add_row(
        "parameters, on the rank that needs most memory", f"{plan['parameters_per_rank']:,}"
    )
    facts.add_row("FLOPs per token, forward", f"{plan['forward_flops_per_token']:,}")
    facts.add_row("FLOPs per token, forward and backward", f"{plan['flops_per_token']:,}")
    facts.add_row("FLOPs per step", f"{plan['flops_per_step']:.3g}")
    at = f"at {plan['utilisation']:.0%} of {plan['gpu_tflops']:g} TFLOP/s"
    facts.add_row(f"seconds per step, {at}", f"{plan['seconds_per_step']:,.3g}")
    facts.add_row(f"hours, {at}", f"{plan['hours']:,.1f}")
    facts.add_row(f"GPU hours, {at}", f"{plan['gpu_hours']:,.0f}")
    return facts


def _bytes(title: str, sizes: dict[str, int]) -> Table:
    shown = Table(title=title, show_header=False)
    shown.add_column("kind")
    shown.add_column("GB", justify="right")
    for kind, size in sizes.items():
        shown.add_row(kind, f"{size / GB:,.3f} GB")
    return shown


def _tables(plan: dict[str, Any]) -> Table:
    layers = ", ".join(map(str, plan["memory_layers"]))
    hashed = any(row["hashed"] for row in plan["tables"])
    shown = Table(
        title=f"Gengram tables of each of the layers {layers}",
        caption="* hashed" if hashed else None,
    )
    for heading in ("table", "rows", "columns", "split by", "per rank", "reason"):
        right = heading in ("rows", "columns", "per rank")
        shown.add_column(heading, justify="right" if right else "left", no_wrap=heading != "reason")
    for row in plan["tables"]:
        shown.add_row(
            row["name"] + ("*" if row["hashed"] else ""),
            f"{row['rows']:,}",
            f"{row['columns']:,}",
            f"{row['split']}, {row['over']}",
            f"{row['rows_per_rank']:,} x {row['columns_per_rank']:,}",
            row["reason"],
        )
    return shown


def show_suggestions(suggestions: list[Suggestion], gpus: int, gigabytes: float) -> None:
    """Prints the fastest layouts, how their time divides, and the overrides for the first."""
    shown = Table(
        title=f"Layouts on {gpus} GPUs that fit in {gigabytes:g} GB: {len(suggestions)}, fastest "
        "first; among those about as fast, the one with the fewest changes first",
        caption="seconds per step: arithmetic + pipeline bubble + communication",
    )
    for heading in ("change", "GB per rank", "seconds per step", "of which"):
        shown.add_column(heading, justify="left" if heading == "change" else "right")
    for suggestion in suggestions[:SHOWN]:
        time = suggestion.time
        shown.add_row(
            suggestion.words.replace("parallel.", "").replace("train.", "") or "unchanged",
            f"{suggestion.memory.total / GB:.1f}",
            f"{time.total:.2f}",
            f"{time.arithmetic:.2f} + {time.bubble:.2f} + {time.communication:.2f}",
        )
    print_table(shown)
    print_text(f"The first: {suggestions[0].words or 'the config unchanged'}")
