"""The command `gengram doctor`: examines the machine, and prints tables."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from gengram_megatron.commands.doctor.examine import examine
from gengram_megatron.config.command_line import Overrides
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.plan.suggest import GB
from gengram_megatron.show import print_table, print_text


def show(found: dict[str, Any]) -> None:
    """Prints what the doctor found as tables."""
    software = found["software"].items()
    print_table(_table("Software", ("package", "version", ""), map(_package, software)))
    if found["devices"]:
        print_table(_table("Devices", ("what", "", ""), _devices(found["devices"])))
    if found["links"]:
        print(found["links"])
    if found["extensions"]:
        looked = found["extensions"].items()
        rows = [(part, one["found"] or "nothing", one["where"]) for part, one in looked]
        headings = ("part", "found", "searched by")
        print_table(_table("Fused parts that megatron-core looks for", headings, rows))
    if found["parts"]:
        rows = [(part, one["uses"], one["why"]) for part, one in found["parts"].items()]
        print_table(_table("Parts of the model", ("part", "uses", "why"), rows))
    rows = [*_run(found), *_folder(found["folder"]), *_measured(found["measured"])]
    if rows:
        print_table(_table("The run on this machine", ("what", "", ""), rows))
    for kind, lines in (
        ("warning", found["plan"]["warnings"] if found["plan"] else []),
        ("advice", found["advice"]),
        ("left out", found["left_out"]),
        ("cannot run here", found["problems"]),
    ):
        for line in lines:
            print_text(f"{kind}: {line}")


def _table(title: str, headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(headings[1:]))
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row)
    return table


def _package(item: tuple[str, dict[str, str | None]]) -> tuple[str, str, str]:
    name, one = item
    return name, one["version"] or "not installed", one["error"] or ""


def _devices(devices: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if devices["listed_by"] == "torch":
        yield "CUDA of torch", devices["cuda"] or "none: torch is built for the CPU", ""
        yield "NCCL", devices["nccl"] or "none", ""
    elif not devices["gpus"]:
        yield "GPU", "none that nvidia-smi lists", ""
    for number, gpu in enumerate(devices["gpus"]):
        text = f"{gpu['bytes'] / GB:.1f} GB, compute capability {gpu['compute_capability']}"
        yield f"GPU {number}", gpu["name"], text
    yield "CPU", f"{devices['threads']} threads", ""


def _run(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if plan := found["plan"]:
        yield "processes", f"{plan['processes']:,}", ""
        needs = plan["memory_bytes_per_rank"]["total"]
        yield "memory of the rank that needs most", f"{needs / GB:.2f} GB", "see gengram plan"


def _folder(folder: dict[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    if folder is None:
        return
    free = f"{folder['free_bytes'] / GB:,.1f} GB"
    yield "free in the folder", free, folder["path"]
    if folder["checkpoint_bytes"] is not None:
        yield "one checkpoint", f"{folder['checkpoint_bytes'] / GB:,.3f} GB", ""
    if speed := folder["speed"]:
        size = f"{speed['bytes'] / 1e6:.0f} MB"
        for what, how in (("written", "with fsync"), ("read", "bypassing the cache if possible")):
            rate = f"{speed[f'{what}_bytes_per_second'] / GB:.2f} GB/s"
            yield f"{size} {what}", rate, how


def _measured(measured: dict[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    if measured is None:
        return
    if product := measured["matrix_product"]:
        for precision, tflops in product["tflops"].items():
            yield f"matrix product in {precision}", f"{tflops:.3g} TFLOP/s", product["device"]
    if reduced := measured["all_reduce"]:
        rate = f"{reduced['bytes_per_second'] / GB:.2f} GB/s"
        how = f"{reduced['bytes'] / 1e6:.0f} MB, {reduced['backend']}"
        yield f"all-reduce of {reduced['processes']} processes", rate, how


CANNOT_RUN = 1
"""Exit code if the config is valid, but cannot run on this machine."""


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="The YAML file of a run; without it, only the machine is examined.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Take only three seconds, without torch: no parts of the model, no speeds; GPUs as "
            "nvidia-smi lists them.",
        ),
    ] = False,
    no_speeds: Annotated[bool, typer.Option("--no-speeds", help="Do not measure speeds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine this machine, and how a config would run on it.

    Shows versions, GPUs and their links; which implementation each part of the model uses here and
    why not a faster one (a small model of the same kind is built and trained for one step); whether
    memory and disk suffice; the speed of a matrix product, an all-reduce of two processes, and the
    file system of run.dir; and what to install or change to be faster.

    \b
      gengram doctor
      gengram doctor configs/smoke/cpu.yaml
      gengram doctor my_run.yaml launch.processes=8 --quick

    The exit code is 1 if the config cannot run here; the last lines say why.
    """
    loaded = load_config(config, overrides or [], Config) if config else None
    report = examine(loaded, quick, speeds=not no_speeds)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    if report["problems"]:
        raise typer.Exit(CANNOT_RUN)
