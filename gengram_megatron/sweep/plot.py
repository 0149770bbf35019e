"""Draws results.png: the loss over the varied key, as in figure 2 of the Gengram paper."""

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gengram_megatron.config.tree import inline_yaml
from gengram_megatron.files import save_figure
from gengram_megatron.runs.plot import decorate
from gengram_megatron.sweep.results import Row
from gengram_megatron.sweep.runs import SEED

COLUMNS = 75
"""Number of characters that fit side by side below the axis."""

Losses = dict[str, list[float]]
"""Losses of runs, in nats per base, by their tick on the axis; several per tick if seeds vary."""


def plot_results(rows: list[Row], key: str | None, out: Path) -> None:
    """Draws the losses over a key's values in the order of the file.

    There is a line for each setting of the grid's other keys, and runs without the key, such as a
    baseline, are horizontal lines. If seeds vary, lines go through the means and dots show each
    run.

    Args:
        rows: those without a loss are left out.
        key: key of the grid; None to draw runs over their names.
        out: the picture to write; its suffix decides the format.
    """
    rows = [row for row in rows if row["loss"] is not None]
    lines, levels = series(rows, key)
    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot: no screen needed
    axes = figure.subplots()
    ticks = list(dict.fromkeys(tick for losses in lines.values() for tick in losses))
    for number, (name, losses) in enumerate(lines.items()):
        _draw_line(axes, f"C{number}", name, losses, ticks)
    for number, (name, values) in enumerate(levels.items(), start=len(lines)):
        label = f"{name} {mean(values):.4f}"
        axes.axhline(mean(values), color=f"C{number}", linestyle=":", label=label)
    crowded = sum(len(tick) + 2 for tick in ticks) > COLUMNS
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(ticks)), ticks, **(slanted if crowded else {}))
    axes.set_xlabel(_leaf(key) if key else "run")
    decorate(axes, "validation loss")
    save_figure(figure, out, dpi=150)


def series(rows: list[Row], key: str | None) -> tuple[dict[str, Losses], Losses]:
    """Returns what is drawn: the losses of each line by tick, and the horizontal lines by name."""
    lines: dict[str, Losses] = {}
    levels: Losses = {}
    for row in rows:
        settings = {name: value for name, value in row["settings"].items() if name != SEED}
        if key is None:
            lines.setdefault("", {}).setdefault(row["group"], []).append(row["loss"])
        elif key not in settings:
            levels.setdefault(row["group"], []).append(row["loss"])
        else:
            tick = _tick(settings.pop(key))
            line = ", ".join(f"{_leaf(name)} {_tick(value)}" for name, value in settings.items())
            lines.setdefault(line, {}).setdefault(tick, []).append(row["loss"])
    return lines, levels


def _draw_line(axes: Axes, colour: str, name: str, losses: Losses, ticks: list[str]) -> None:
    drawn = [tick for tick in ticks if tick in losses]
    means = [mean(losses[tick]) for tick in drawn]
    axes.plot([ticks.index(tick) for tick in drawn], means, "o-", color=colour, label=name or None)
    if any(len(values) > 1 for values in losses.values()):
        dots = [(ticks.index(tick), loss) for tick in drawn for loss in losses[tick]]
        axes.plot(*zip(*dots), ".", color=colour, alpha=0.5)


def _tick(value: object) -> str:
    """Returns a value as it stands on the axis; a list with one entry is shown as that entry."""
    shown = value[0] if isinstance(value, list) and len(value) == 1 else value
    return inline_yaml(shown).strip("[]")


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]
