"""loss.png: the loss of one run, or of several side by side."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from gengram_megatron.config.schema import Config
from gengram_megatron.config.weights import count_parameters
from gengram_megatron.files import replacing, save_figure
from gengram_megatron.runs.metrics import UNIFORM, read_metrics

SMOOTHING = 0.02  # width of the smoothing window, as a share of the run's steps
LAST_NATS = 0.1
"""What the picture shows at least above the lowest loss: enough for differences of a thousandth of
a nat to be seen."""
LATE = 0.75  # the share of a run, at its end, that decides what the picture shows
REFERENCE_GREYS = ("#767676", "#646464", "#505050", "#3c3c3c")
MARKOV_FILE = "markov.json"
"""In a data set's folder: the losses of Markov models on its validation split, by their order."""

Series = tuple[np.ndarray, np.ndarray]
"""Tokens and losses [n]."""


def plot_loss(
    metrics: dict[str, Path],
    out: Path,
    references: dict[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draws training and validation loss over the tokens seen, near where they end.

    The legend has the last values: of training that of the running mean, which is the thick line.

    Args:
        metrics: the name of each run and its metrics.jsonl.
        out: the picture to write; its ending decides the format.
        references: horizontal lines to compare with, in nats a base, besides that of uniform
            letters, which is always there.
        title: what the picture shows; None: nothing is written above it.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")  # without pyplot: no screen needed
    axes = figure.subplots()
    runs = {name: read_metrics(path) for name, path in metrics.items()}
    for colour, (name, entries) in enumerate(runs.items()):
        _draw_run(axes, f"C{colour}", name if len(runs) > 1 else "", entries)
    levels = {"uniform letters": UNIFORM, **(references or {})}
    axes.set_ylim(*_limits(runs.values(), levels))
    _draw_references(axes, levels)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_number(count)))
    axes.set_xlim(left=0)
    if title:
        figure.suptitle(title, fontsize=10)
    # Above the axes, where the legend hides no part of a curve.
    decorate(axes, "loss", loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, fontsize=9)
    save_figure(figure, Path(out), dpi=150)


def run_title(config: Config, tokens: int) -> str:
    """What a run is, in two lines: its name; the size of its model and the tokens it reads.

    tokens: of the whole run.
    """
    model, parameters = config.model, count_parameters(config)
    words = [f"{short_number(parameters.total)} parameters"]
    if model.num_experts:
        words.append(
            f"{short_number(parameters.activated)} of them activated "
            f"({model.moe_router_topk} of {model.num_experts} experts)"
        )
    if model.gengram.enabled:
        layers = model.gengram.layers
        words.append(f"Gengram in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}")
    else:
        words.append("without Gengram")
    words.append(f"{short_number(tokens)} tokens")
    name = "/".join(Path(config.run.dir).parts[-2:])
    return f"{name}\n{'; '.join(words)}"


def short_number(count: float) -> str:
    """Three digits and a unit: 819 k, 1.25 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def write_markov_levels(folder: Path, checksums: dict[str, str], nats: dict[int, float]) -> None:
    """Keep what was counted on a data set, so that the pictures of its runs show it.

    Args:
        folder: of the data set.
        checksums: SHA-256 of each split that was counted on, by the split's name.
        nats: loss on the validation split, in nats a base, by the order of the Markov model.
    """
    with replacing(Path(folder) / MARKOV_FILE) as beside:
        beside.write_text(json.dumps({"sha256": checksums, "nats": nats}, indent=2) + "\n")


def markov_levels(folder: Path, checksums: dict[str, str]) -> dict[str, float]:
    """The reference lines of a data set; none where nothing was counted on these very splits."""
    try:
        found = json.loads((Path(folder) / MARKOV_FILE).read_text())
        if found["sha256"] != checksums:
            return {}
        return {f"Markov {order}": float(nats) for order, nats in found["nats"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a picture without these lines is better than none


def _draw_run(axes: Axes, colour: str, name: str, entries: list[dict]) -> None:
    """One run in one colour: raw losses thin, their running mean thick, validations as dots."""
    tokens, loss = _series(entries, "train")
    if len(loss):
        smooth = _smooth(loss)
        axes.plot(tokens, loss, color=colour, linewidth=0.6, alpha=0.35)
        label = f"{name} training {_last(smooth)}".strip()
        marker = "." if len(loss) == 1 else None  # a line needs two points
        axes.plot(tokens, smooth, color=colour, linewidth=1.8, marker=marker, label=label)
        _mark_not_finite(axes, colour, name, tokens[~np.isfinite(loss)])
    tokens, loss = _series(entries, "validation")
    if len(loss):
        label = f"{name} validation {_last(loss)}".strip()
        style = {"marker": "o", "markersize": 6, "markeredgecolor": "white", "linestyle": "--"}
        axes.plot(tokens, loss, color=colour, linewidth=1, label=label, zorder=3, **style)


def _mark_not_finite(axes: Axes, colour: str, name: str, tokens: np.ndarray) -> None:
    """Crosses at the lower edge, at the steps that have no loss to draw."""
    if len(tokens):
        label = f"{name} not finite: {len(tokens)} steps".strip()
        edge = axes.get_xaxis_transform()
        style = {"marker": "x", "linestyle": "none", "markersize": 5, "clip_on": False}
        axes.plot(tokens, np.zeros(len(tokens)), color=colour, transform=edge, label=label, **style)


def _last(losses: np.ndarray) -> str:
    return f"{losses[-1]:.4f}" if math.isfinite(losses[-1]) else "not finite"


def _series(entries: list[dict], kind: str) -> Series:
    """Tokens and losses [n] of the lines of one kind."""
    points = [(entry["tokens"], entry["loss"]) for entry in entries if entry["kind"] == kind]
    tokens, loss = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, loss


def _smooth(loss: np.ndarray) -> np.ndarray:
    """Centred running mean [n] -> [n] of what is finite; at both ends over the part of the window
    that is there."""
    window = np.ones(2 * max(1, round(len(loss) * SMOOTHING / 2)) + 1)
    there = np.isfinite(loss)
    sums = np.convolve(np.where(there, loss, 0), window, mode="full")
    counts = np.convolve(there.astype(float), window, mode="full").round()
    means = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means[len(window) // 2 :][: len(loss)]


def _limits(runs: Iterable[list[dict]], levels: dict[str, float]) -> tuple[float, float]:
    """Bottom and top of the picture, in nats.

    What matters is where the curves end, so the last three quarters of each run decide: the picture
    goes from the lowest loss there a tenth of a nat up, or further where they take more room (the
    highest tenth of them left out, for spikes), and the curves enter from above. Once a run is below
    uniform letters, what is above them is warm-up, or a run that failed, and may lie outside. The
    last validation and all reference lines below the top are always in it.
    """
    low, high, must = [], [], []
    for entries in runs:
        loss = _series(entries, "train")[1]
        late = _finite(_smooth(loss)) if len(loss) else loss
        late = late[int((1 - LATE) * len(late)) :]
        if len(late):
            low.append(late.min())
            high.append(np.percentile(late, 90))
        must += [*_finite(_series(entries, "validation")[1])[-1:]]
    bottom = min([*low, *must], default=UNIFORM)
    top = max([bottom + LAST_NATS, *high])
    if bottom < UNIFORM:
        top = min(top, max(UNIFORM, bottom + LAST_NATS))
    top = max([top, *must])
    bottom = min([bottom, *(nats for nats in levels.values() if nats < top)])
    margin = 0.05 * (top - bottom)
    return bottom - margin, top + margin


def _finite(losses: np.ndarray) -> np.ndarray:
    return losses[np.isfinite(losses)]


def _draw_references(axes: Axes, levels: dict[str, float]) -> None:
    """Dotted lines, named at the left-hand end, where the curves have not come down to them. Those
    that lie too close for a name each share one, and those above the picture are named at its
    upper edge."""
    bottom, top = axes.get_ylim()
    ordered = sorted(levels.items(), key=lambda item: -item[1])
    above = [f"{name} {nats:.4f}" for name, nats in ordered if nats > top]
    if above:
        _write(axes, 1, "axes fraction", "above: " + ", ".join(above), REFERENCE_GREYS[0], "top")
    inside = [(name, nats) for name, nats in ordered if nats <= top]
    groups: list[list[tuple[str, float]]] = []
    for name, nats in inside:
        if groups and groups[-1][0][1] - nats < 0.04 * (top - bottom):
            groups[-1].append((name, nats))
        else:
            groups.append([(name, nats)])
    for group, grey in zip(groups, REFERENCE_GREYS * len(groups)):
        for _, nats in group:
            axes.axhline(nats, color=grey, linewidth=1, linestyle=":", zorder=1)
        names = ", ".join(f"{name} {nats:.4f}" for name, nats in group)
        _write(axes, group[0][1], "data", names, grey, "bottom")


def _write(axes: Axes, height: float, unit: str, text: str, colour: str, side: str) -> None:
    """A name at the left-hand end, its given side at a height."""
    axes.annotate(
        text,
        xy=(0, height),
        xycoords=("axes fraction", unit),
        xytext=(4, 2 if side == "bottom" else -4),
        textcoords="offset points",
        ha="left",
        va=side,
        fontsize=8,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )


def decorate(axes: Axes, loss: str, **legend: Any) -> None:
    """Grid, legend, and the axes of a loss: nats a base on the left, bits a base on the right.

    legend: where it lies and how it looks, as of matplotlib.
    """
    axes.set_ylabel(f"{loss}, nats a base")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    bits = axes.secondary_yaxis(
        "right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
    )
    bits.set_ylabel("bits a base")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **legend)
