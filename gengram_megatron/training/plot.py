"""loss.png: the loss of one run, or of several side by side."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from gengram_megatron.files import save_figure
from gengram_megatron.training.metrics import read_metrics

SMOOTHING = 0.02  # width of the smoothing window, as a share of the run's steps
REFERENCE_GREYS = ("#8a8a8a", "#6f6f6f", "#555555", "#3c3c3c")


def plot_loss(
    metrics: dict[str, Path], out: Path, references: dict[str, float] | None = None
) -> None:
    """Draws training and validation loss over the tokens seen.

    Args:
        metrics: the name of each run and its metrics.jsonl.
        out: the picture to write; its ending decides the format.
        references: horizontal lines to compare with, in nats a base.
    """
    figure = Figure(figsize=(9, 5.5), layout="constrained")  # without pyplot: no screen needed
    axes = figure.subplots()
    runs = {name: read_metrics(path) for name, path in metrics.items()}
    for colour, (name, entries) in enumerate(runs.items()):
        _draw_run(axes, f"C{colour}", name if len(runs) > 1 else "", entries)
    _draw_references(axes, references or {})
    axes.set_ylim(*_limits(runs.values(), references or {}))
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlim(left=0)
    decorate(axes, "loss")
    save_figure(figure, Path(out), dpi=150)


def _draw_run(axes: Axes, colour: str, name: str, entries: list[dict]) -> None:
    """One run in one colour: raw losses thin, their running mean thick, validations as dots."""
    tokens, loss = _series(entries, "train")
    if len(loss):
        label = f"{name} training".strip()
        axes.plot(tokens, loss, color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(tokens, _smooth(loss), color=colour, linewidth=1.8, label=label)
    tokens, loss = _series(entries, "validation")
    if len(loss):
        label = f"{name} validation {loss[-1]:.4f}".strip()
        style = {"marker": "o", "markersize": 6, "markeredgecolor": "white", "linestyle": "--"}
        axes.plot(tokens, loss, color=colour, linewidth=1, label=label, zorder=3, **style)


def _series(entries: list[dict], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and losses [n] of the lines of one kind."""
    points = [(entry["tokens"], entry["loss"]) for entry in entries if entry["kind"] == kind]
    tokens, loss = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, loss


def _smooth(loss: np.ndarray) -> np.ndarray:
    """Centred running mean [n] -> [n]; at both ends over the part of the window that is there."""
    width = 2 * max(1, round(len(loss) * SMOOTHING / 2)) + 1
    window = np.ones(width)
    sums = np.convolve(loss, window, mode="full")
    counts = np.convolve(np.ones(len(loss)), window, mode="full")
    middle = slice(width // 2, width // 2 + len(loss))
    return (sums / counts)[middle]


def _limits(runs: Iterable[list[dict]], references: dict[str, float]) -> tuple[float, float]:
    """Bottom and top of the picture, in nats.

    What is worse than guessing one of four bases is warm-up: once a run is past it, the picture
    begins there and the curves enter from above. Before, it shows all but the first twentieth.
    """
    shown, late = list(references.values()), []
    for entries in runs:
        loss = _series(entries, "train")[1]
        late += [*_smooth(loss)[len(loss) // 20 :]] if len(loss) else []
        shown += [*_series(entries, "validation")[1]]
    past = [nats for nats in (*shown, *late) if math.isfinite(nats)] or [0.0, math.log(4)]
    top = max(past)
    if min(past) < math.log(4):
        top = max([math.log(4), *references.values()])
    margin = 0.05 * (top - min(past)) or 0.05
    return min(past) - margin, top + margin


def _draw_references(axes: Axes, references: dict[str, float]) -> None:
    """Dotted lines, named at the left-hand end, where the curves have not come down to them."""
    ordered = sorted(references.items(), key=lambda item: -item[1])
    for (name, nats), grey in zip(ordered, REFERENCE_GREYS * len(ordered)):
        axes.axhline(nats, color=grey, linewidth=1, linestyle=":", zorder=1)
        axes.annotate(
            f"{name}: {nats:.4f}",
            xy=(0, nats),
            xycoords=("axes fraction", "data"),
            xytext=(4, 2),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=8,
            color=grey,
        )


def decorate(axes: Axes, loss: str) -> None:
    """Grid, legend, and the axes of a loss: nats a base on the left, bits a base on the right."""
    axes.set_ylabel(f"{loss}, nats a base")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    bits = axes.secondary_yaxis(
        "right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
    )
    bits.set_ylabel("bits a base")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
