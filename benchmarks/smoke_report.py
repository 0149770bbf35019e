"""What scripts/smoke.sh prints at its end, and its check of the resumed run.

    python benchmarks/smoke_report.py middle RUN     the name of a run's first checkpoint
    python benchmarks/smoke_report.py result RUNS DATA

RUNS holds the runs `gengram`, `resumed` and `without`; DATA is the data set's folder. Exits with 1
if the resumed run's losses are not bit for bit those of the run that was not cut.
"""

import math
import sys
from pathlib import Path

from markov import keep, markov_nats
from rich.console import Console
from rich.table import Table

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.runs.metrics import read_metrics
from gengram_megatron.runs.plot import plot_loss, short_number

ORDERS = (1, 3, 5)


def middle(run: Path) -> str:
    """The first checkpoint of a run, which smoke configs place in its middle."""
    return min(path.name for path in (run / "checkpoints").iterdir())


def losses(run: Path) -> dict[tuple[str, int], float]:
    """Loss, in nats a base, of every training step and validation of a run."""
    return {(e["kind"], e["step"]): e["loss"] for e in read_metrics(run / "metrics.jsonl")}


def resumed_as_unbroken(runs: Path) -> tuple[bool, str]:
    """Whether the resumed run's training losses equal the unbroken run's, and a sentence."""
    unbroken, resumed = losses(runs / "gengram"), losses(runs / "resumed")
    steps = [key for key in resumed if key[0] == "train"]
    differ = [step for kind, step in steps if resumed[kind, step] != unbroken[kind, step]]
    if not steps:
        return False, "resume: the resumed run trained no step"
    if differ:
        return False, f"resume: losses differ from step {differ[0]} on"
    return True, f"resume: the losses of {len(steps)} steps after the cut are bit-identical"


def last_validation(run: Path) -> float:
    """Nats a base on the validation split at a run's end."""
    found = losses(run)
    return found[max(key for key in found if key[0] == "validation")]


def title(runs: Path) -> str:
    """Of the picture: what both runs are."""
    with_memory, without = (
        count_parameters(load_config(runs / name / "config.yaml", [], Config)).total
        for name in ("gengram", "without")
    )
    tokens = read_metrics(runs / "gengram" / "metrics.jsonl")[-1]["tokens"]
    return (
        f"The smoke run, {short_number(tokens)} tokens\n{short_number(with_memory)} parameters "
        f"with Gengram, {short_number(without)} without"
    )


def result(runs: Path, data: Path) -> int:
    """Print the table, draw loss.png, and return the exit code."""
    console = Console()
    with_memory, without = (last_validation(runs / name) for name in ("gengram", "without"))
    markov = markov_nats(data, ORDERS)
    keep(data, markov)
    rows = {
        "uniform over A, C, G, T": math.log(4),
        **{f"Markov model of order {order}": nats for order, nats in markov.items()},
        "the model without Gengram": without,
        "the model with Gengram": with_memory,
    }
    table = Table(title="Loss on the validation split, which no model saw")
    for name, justify in (("", "left"), ("nats a base", "right"), ("bits a base", "right")):
        table.add_column(name, justify=justify)
    for name, nats in rows.items():
        table.add_row(name, f"{nats:.4f}", f"{nats / math.log(2):.4f}")
    console.print(table)

    picture = runs / "loss.png"
    plot_loss(
        {
            "with Gengram": runs / "gengram/metrics.jsonl",
            "without Gengram": runs / "without/metrics.jsonl",
        },
        picture,
        {f"Markov {k}": markov[k] for k in ORDERS},
        title(runs),
    )
    same, sentence = resumed_as_unbroken(runs)
    console.print(sentence, highlight=False)
    for name, path in {
        "picture": picture,
        "run with Gengram": runs / "gengram",
        "run without": runs / "without",
        "data set": data,
    }.items():
        console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
    return 0 if same else 1


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "middle":
        print(middle(Path(words[0])))
    else:
        sys.exit(result(Path(words[0]), Path(words[1])))
