"""results.png: the loss over what varies, as in figure 2 of the Gengram paper."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gengram_megatron.config.tree import inline_yaml
from gengram_megatron.files import save_figure
from gengram_megatron.runs.plot import decorate
from gengram_megatron.sweep.results import Row
from gengram_megatron.sweep.runs import SEED

COLUMNS = 75
"""Characters that fit side by side below the axis."""

Losses = dict[str, list[float]]
"""Losses, in nats a base, of the runs at a place of the axis; more than one where seeds vary."""


def plot_results(found: list[Row], key: str | None, out: Path) -> None:
    """Draw the losses over a key's values in the order of the file.

    The other keys of the grid make several lines, and runs without the key, such as a baseline,
    are horizontal lines. Where seeds vary, lines go through the means and dots show each run.

    Args:
        found: rows; those without a loss are left out.
        key: of the grid; None: runs by their names.
        out: the picture to write; its ending decides the format.
    """
    found = [row for row in found if row["loss"] is not None]
    lines, levels = series(found, key)
    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot: no screen needed
    axes = figure.subplots()
    places = list(dict.fromkeys(at for losses in lines.values() for at in losses))
    for number, (name, losses) in enumerate(lines.items()):
        _draw_line(axes, f"C{number}", name, losses, places)
    for number, (name, losses) in enumerate(levels.items(), start=len(lines)):
        label = f"{name} {mean(losses):.4f}"
        axes.axhline(mean(losses), color=f"C{number}", linestyle=":", label=label)
    crowded = sum(len(place) + 2 for place in places) > COLUMNS
    slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(places)), places, **slanted)
    axes.set_xlabel(_leaf(key) if key else "run")
    decorate(axes, "validation loss")
    save_figure(figure, out, dpi=150)


def series(found: list[Row], key: str | None) -> tuple[dict[str, Losses], Losses]:
    """What is drawn: for each line its losses by place, and the horizontal lines by name."""
    lines: dict[str, Losses] = {}
    levels: Losses = {}
    for row in found:
        others = {name: value for name, value in row["settings"].items() if name != SEED}
        if key is None:
            lines.setdefault("", {}).setdefault(row["group"], []).append(row["loss"])
        elif key not in others:
            levels.setdefault(row["group"], []).append(row["loss"])
        else:
            at = _tick(others.pop(key))
            line = ", ".join(f"{_leaf(name)} {_tick(value)}" for name, value in others.items())
            lines.setdefault(line, {}).setdefault(at, []).append(row["loss"])
    return lines, levels


def _draw_line(axes: Axes, colour: str, name: str, losses: Losses, places: list[str]) -> None:
    at = [place for place in places if place in losses]
    means = [mean(losses[place]) for place in at]
    axes.plot([places.index(p) for p in at], means, "o-", color=colour, label=name or None)
    if any(len(values) > 1 for values in losses.values()):
        dots = [(places.index(place), loss) for place in at for loss in losses[place]]
        axes.plot(*zip(*dots), ".", color=colour, alpha=0.5)


def _tick(value: object) -> str:
    """A value on the axis; a list of one stands for its entry."""
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    return inline_yaml(one).strip("[]")


def _leaf(key: str) -> str:
    return key.rsplit(".", 1)[-1]
