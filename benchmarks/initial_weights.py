"""The picture of configs/sweeps/initial_weights_cpu.yaml: validation loss by tokens.

    gengram sweep configs/sweeps/initial_weights_cpu.yaml --launch --results
    python benchmarks/initial_weights.py [FOLDER [FILE.png]]

FOLDER holds the sweep's runs. Lines are the means of the seeds of the long runs and dots each run;
crosses are the short runs, whose learning rate has gone down by then.
"""

import sys
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.files import save_figure
from gengram_megatron.runs.metrics import read_metrics
from gengram_megatron.runs.plot import decorate

FOLDER = Path("runs/sweeps/initial_weights_cpu")
OUT = Path("benchmarks/results/initial_weights_cpu.png")


def kind(config: Config) -> str:
    """What a run's line is called."""
    gengram = config.model.gengram
    if not gengram.enabled:
        return "no memory"
    window = "no window" if gengram.window is None else f"window {gengram.window}"
    return f"{window}, {gengram.init} start"


def losses(folder: Path) -> dict[tuple[str, int], dict[int, list[float]]]:
    """By kind and number of steps of the runs: tokens to the validation losses of their seeds."""
    found: dict[tuple[str, int], dict[int, list[float]]] = {}
    for file in sorted(folder.glob("*/metrics.jsonl")):
        config = load_config(file.parent / "config.yaml", [], Config)
        points = found.setdefault((kind(config), config.train.steps), {})
        for entry in read_metrics(file):
            if entry["kind"] == "validation":
                points.setdefault(entry["tokens"], []).append(entry["loss"])
    return found


def draw(found: dict[tuple[str, int], dict[int, list[float]]], out: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    longest = max(steps for _, steps in found)
    colours = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(name for name, _ in found))}
    for (name, steps), points in found.items():
        tokens = [n / 1e6 for n in sorted(points)]
        values = [points[n] for n in sorted(points)]
        style = "-" if steps == longest else "x"
        label = name if steps == longest else None
        axes.plot(tokens, [mean(v) for v in values], style, color=colours[name], label=label)
        dots = [(n, loss) for n, seeds in zip(tokens, values) for loss in seeds]
        axes.plot(*zip(*dots), ".", color=colours[name], alpha=0.5)
    axes.set_xlabel("tokens, millions")
    decorate(axes, "validation loss")
    save_figure(figure, out, dpi=110)


def main() -> None:
    """Read the folder and draw it."""
    words = [Path(word) for word in sys.argv[1:]]
    folder, out = (words + [FOLDER, OUT][len(words) :])[:2]
    found = losses(folder)
    if not found:
        sys.exit(f"{folder} holds no runs; see the top of this file")
    draw(found, out)
    print(out)


if __name__ == "__main__":
    main()
