"""A plan as tables, for people."""

from rich.table import Table

from gengram_megatron.plan.suggest import Suggestion
from gengram_megatron.plan.warnings import GB
from gengram_megatron.show import print_table, print_text

SHOWN = 10
"""Layouts that --suggest prints; --json has all."""


def show(plan: dict) -> None:
    """What gengram plan prints."""
    print_table(_facts(plan))
    stage = plan["memory_bytes_per_rank"]["stage"] + 1
    kinds = {k: v for k, v in plan["memory_bytes_per_rank"].items() if k != "stage"}
    print_table(_bytes(f"Memory of the fullest rank, in pipeline stage {stage}", kinds))
    sent = {k.replace("_", " "): v for k, v in plan["bytes_sent_per_rank_and_step"].items() if v}
    if sent:
        print_table(_bytes("Sent by a rank in a step, at most", sent))
    if plan["tables"]:
        print_table(_tables(plan))
        made = plan["projection"]
        print_text(f"Key and value are projected from {made['of']}: {made['reason']}")
    for sentence in plan["warnings"]:
        print_text(f"warning: {sentence}")


def _facts(plan: dict) -> Table:
    facts = Table(title="The run", show_header=False)
    facts.add_column("what")
    facts.add_column("number", justify="right")
    for name in ("processes", "steps", "samples", "tokens"):
        facts.add_row(name, f"{plan[name]:,}")
    if plan["samples_trained"] != plan["samples"]:
        facts.add_row("samples, in whole batches", f"{plan['samples_trained']:,}")
    for name, number in plan["parameters"].items():
        facts.add_row(f"parameters, {name}", f"{number:,}")
    facts.add_row("parameters, of the fullest rank", f"{plan['parameters_per_rank']:,}")
    facts.add_row("FLOPs a token, forward", f"{plan['forward_flops_per_token']:,}")
    facts.add_row("FLOPs a token, forward and backward", f"{plan['flops_per_token']:,}")
    facts.add_row("FLOPs a step", f"{plan['flops_per_step']:.3g}")
    at = f"at {plan['utilisation']:.0%} of {plan['gpu_tflops']:g} TFLOP/s"
    facts.add_row(f"seconds a step, {at}", f"{plan['seconds_per_step']:,.3g}")
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


def _tables(plan: dict) -> Table:
    layers = ", ".join(map(str, plan["memory_layers"]))
    hashed = any(row["hashed"] for row in plan["tables"])
    shown = Table(
        title=f"Memory tables of each of the layers {layers}",
        caption="* hashed" if hashed else None,
    )
    for heading in ("table", "rows", "columns", "split by", "a rank holds", "because"):
        right = heading in ("rows", "columns", "a rank holds")
        shown.add_column(
            heading, justify="right" if right else "left", no_wrap=heading != "because"
        )
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


def show_suggestions(found: list[Suggestion], gpus: int, gigabytes: float) -> None:
    """The fastest layouts, where their time goes, and the words that choose the first."""
    shown = Table(
        title=f"Layouts on {gpus} GPUs that fit in {gigabytes:g} GB: {len(found)}, the fastest first; of "
        "those about as fast, the one with the fewest changes",
        caption="seconds a step: arithmetic + waiting in the pipeline + communication",
    )
    for heading in ("change", "GB a rank", "seconds a step", "of which"):
        shown.add_column(heading, justify="left" if heading == "change" else "right")
    for one in found[:SHOWN]:
        time = one.time
        shown.add_row(
            one.words.replace("parallel.", "").replace("train.", "") or "as it is",
            f"{one.memory.total / GB:.1f}",
            f"{time.total:.2f}",
            f"{time.arithmetic:.2f} + {time.bubble:.2f} + {time.communication:.2f}",
        )
    print_table(shown)
    print_text(f"The first: {found[0].words or 'the config as it is'}")
