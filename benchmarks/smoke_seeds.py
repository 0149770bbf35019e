"""The smoke model with and without Gengram, over several seeds: does the memory help?

    python benchmarks/smoke_seeds.py [--seeds 1,2,3] [--out FOLDER] [KEY=VALUE ...]

Trains both models with each seed in turn on this machine (the data set must have been built:
`gengram-data build configs/data/sample.yaml`), prints the validation loss of each and the paired
difference, and writes them to OUT/smoke_seeds.json. A pair shares seed, samples and order; its
weights outside the memory start equal. A run that is finished is not run again.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gengram_megatron.runs.metrics import read_metrics

CONFIG = "configs/smoke/cpu.yaml"
ONE_PROCESS = ["parallel.tensor=1", "parallel.pipeline=1", "checkpoint.keep=1"]


def train(folder: Path, seed: int, gengram: bool, words: list[str]) -> float:
    """Train one model; returns its last validation loss, nats a base."""
    run = folder / f"{'with' if gengram else 'without'}-seed{seed}"
    command = [sys.executable, "-m", "gengram_megatron", "train", CONFIG, *ONE_PROCESS]
    command += [
        f"run.dir={run}",
        f"run.seed={seed}",
        f"model.gengram.enabled={str(gengram).lower()}",
    ]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)
    return [e["loss"] for e in read_metrics(run / "metrics.jsonl") if e["kind"] == "validation"][-1]


def main() -> None:
    """Train all pairs and report them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("runs/smoke_seeds"))
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    pairs = []
    for seed in map(int, arguments.seeds.split(",")):
        found = {
            "seed": seed,
            "with": train(arguments.out, seed, True, arguments.words),
            "without": train(arguments.out, seed, False, arguments.words),
        }
        pairs.append(found)
        print(found, flush=True)
    report(pairs, arguments.words, arguments.out)


def report(pairs: list[dict], words: list[str], out: Path) -> None:
    """The table on the screen, and the numbers in a file."""
    mean = {name: statistics.mean(p[name] for p in pairs) for name in ("with", "without")}
    table = Table(title="Validation loss, nats a base")
    for heading in ("seed", "with Gengram", "without", "difference"):
        table.add_column(heading, justify="right")
    for row in [*pairs, {"seed": "mean", **mean}]:
        difference = row["with"] - row["without"]
        table.add_row(
            str(row["seed"]), f"{row['with']:.4f}", f"{row['without']:.4f}", f"{difference:+.4f}"
        )
    Console().print(table)
    result = {
        "what": "validation loss in nats a base of the smoke model, paired by seed",
        "config": CONFIG,
        "words": words,
        "machine": f"{platform.machine()} CPU, Python {platform.python_version()}",
        "pairs": pairs,
        "mean": mean,
        "mean_difference": mean["with"] - mean["without"],
    }
    (out / "smoke_seeds.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
