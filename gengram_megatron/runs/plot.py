"""Draws loss.png: the loss of one run, or of several in comparison."""

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
"""The picture shows at least this range above the lowest loss. On this scale, differences of a
thousandth of a nat are visible."""
LATE = 0.75  # the last share of a run that decides the range of the picture
REFERENCE_GREYS = ("#767676", "#646464", "#505050", "#3c3c3c")
MARKOV_FILE = "markov.json"
"""A file in a data set's folder: the losses of Markov models on its validation split, by order."""

Series = tuple[np.ndarray, np.ndarray]
"""Tokens [n] and losses [n]."""
Entries = list[dict[str, Any]]
"""The lines of a metrics.jsonl."""


def plot_loss(
    metrics: dict[str, Path],
    out: Path,
    references: dict[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draws training and validation loss over the tokens seen, in a range around their final
    values.

    The legend has the last values, for training those of the running mean, which is the thick line.

    Args:
        metrics: the metrics.jsonl of each run, by its name.
        out: the picture to write; its suffix decides the format.
        references: horizontal lines to compare with, in nats per base; the one of uniform letters
            is always drawn.
        title: the title above the picture; None for no title.
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
    # The legend is above the axes, so that it hides no part of a curve.
    decorate(axes, "loss", loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, fontsize=9)
    save_figure(figure, Path(out), dpi=150)


def run_title(config: Config, tokens: int) -> str:
    """Returns a title of two lines: the name of the run, and the size of its model and training.

    Args:
        tokens: tokens of the whole run.
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
    """Returns a number with three digits and a unit, such as 819 k or 1.25 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def write_markov_levels(folder: Path, checksums: dict[str, str], nats: dict[int, float]) -> None:
    """Stores the losses of Markov models on a data set, so that the pictures of its runs show them.

    Args:
        folder: folder of the data set.
        checksums: SHA-256 of each split that was used, by the split's name.
        nats: loss on the validation split, in nats per base, by the order of the Markov model.
    """
    with replacing(Path(folder) / MARKOV_FILE) as beside:
        beside.write_text(json.dumps({"sha256": checksums, "nats": nats}, indent=2) + "\n")


def markov_levels(folder: Path, checksums: dict[str, str]) -> dict[str, float]:
    """Returns the losses of Markov models on a data set by name, for reference lines; empty if
    there are none for exactly these splits."""
    try:
        stored = json.loads((Path(folder) / MARKOV_FILE).read_text())
        if stored["sha256"] != checksums:
            return {}
        return {f"Markov {order}": float(nats) for order, nats in stored["nats"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a picture without these lines is better than no picture


def _draw_run(axes: Axes, colour: str, name: str, entries: Entries) -> None:
    """Draws one run in one colour: losses as a thin line, their running mean as a thick one, and
    validations as dots."""
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
        style: dict[str, Any] = {"markersize": 6, "markeredgecolor": "white", "zorder": 3}
        axes.plot(tokens, loss, "o--", color=colour, linewidth=1, label=label, **style)


def _mark_not_finite(axes: Axes, colour: str, name: str, tokens: np.ndarray) -> None:
    """Draws crosses at the lower edge for the steps whose losses are not finite."""
    if len(tokens):
        label = f"{name} not finite: {len(tokens)} steps".strip()
        edge = axes.get_xaxis_transform()
        style: dict[str, Any] = {"markersize": 5, "clip_on": False, "transform": edge}
        axes.plot(tokens, np.zeros(len(tokens)), "x", color=colour, label=label, **style)


def _last(losses: np.ndarray) -> str:
    return f"{losses[-1]:.4f}" if math.isfinite(losses[-1]) else "not finite"


def _series(entries: Entries, kind: str) -> Series:
    """Returns the tokens [n] and losses [n] of the entries of one kind."""
    points = [(entry["tokens"], entry["loss"]) for entry in entries if entry["kind"] == kind]
    tokens, loss = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, loss


def _smooth(loss: np.ndarray) -> np.ndarray:
    """Returns the centred running mean [n] of the finite losses [n]. At both ends the window is
    truncated."""
    window = np.ones(2 * max(1, round(len(loss) * SMOOTHING / 2)) + 1)
    finite = np.isfinite(loss)
    sums = np.convolve(np.where(finite, loss, 0), window, mode="full")
    counts = np.convolve(finite.astype(float), window, mode="full").round()
    means: np.ndarray = np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)
    return means[len(window) // 2 :][: len(loss)]


def _limits(runs: Iterable[Entries], levels: dict[str, float]) -> tuple[float, float]:
    """Returns the bottom and top of the picture, in nats.

    The end of the curves matters most, so the last three quarters of each run decide. The picture
    reaches from their lowest loss a tenth of a nat up, or further if needed to show them without
    their highest tenth, which may be spikes; the curves enter from above. Once a run is below
    uniform letters, losses above that belong to the warm-up or to a failed run, and may lie
    outside. The last validation, and all reference lines below the top, are always inside.
    """
    low, high, required = [], [], []
    for entries in runs:
        loss = _series(entries, "train")[1]
        late = _finite(_smooth(loss)) if len(loss) else loss
        late = late[int((1 - LATE) * len(late)) :]
        if len(late):
            low.append(late.min())
            high.append(np.percentile(late, 90))
        required += [*_finite(_series(entries, "validation")[1])[-1:]]
    bottom = min([*low, *required], default=UNIFORM)
    top = max([bottom + LAST_NATS, *high])
    if bottom < UNIFORM:
        top = min(top, max(UNIFORM, bottom + LAST_NATS))
    top = max([top, *required])
    bottom = min([bottom, *(nats for nats in levels.values() if nats < top)])
    margin = 0.05 * (top - bottom)
    return bottom - margin, top + margin


def _finite(losses: np.ndarray) -> np.ndarray:
    finite: np.ndarray = losses[np.isfinite(losses)]
    return finite


def _draw_references(axes: Axes, levels: dict[str, float]) -> None:
    """Draws the reference lines as dotted lines, labelled at the left end, where the curves are
    still above them. Lines that are too close for separate labels share one, and those above the
    picture are listed at its upper edge."""
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
    """Writes a label at the left end, with its `side` (top or bottom) at a height."""
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
    """Adds a grid, a legend, and the axes of a loss: nats per base on the left, bits per base on
    the right.

    Args:
        legend: keyword arguments of matplotlib's legend.
    """
    axes.set_ylabel(f"{loss}, nats per base")
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)
    bits = axes.secondary_yaxis(
        "right",
        functions=(
            lambda nats: np.divide(nats, math.log(2)),
            lambda bits: np.multiply(bits, math.log(2)),
        ),
    )
    bits.set_ylabel("bits per base")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **legend)
