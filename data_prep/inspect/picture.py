"""One page that shows what is in a data set."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from data_prep.inspect.contents import SplitContents
from data_prep.inspect.opened import DataSet
from gengram_megatron.errors import UserError
from gengram_megatron.files import check_writable, save_figure
from gengram_megatron.tokenizer import BASES

MOST_SOURCES = 30  # bars that stay readable
MOST_NUMBERED = 5  # groups whose shares of a base can be written above their bars
FEWEST_ROWS = 8  # that a panel of bars has room for, so that a single bar does not fill it
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08), "ncols": 2}
"""Where the legend of a panel lies: below its axes, where it hides no bar."""
PANELS = [["composition", "gc", "sources"], ["n", "strands", "sources"]]


def check_ending(out: Path) -> None:
    """UserError unless a picture can be written under this name."""
    endings = Figure().canvas.get_supported_filetypes()
    if out.suffix[1:] not in endings:
        raise UserError(f"--report {out}: the name must end in .png, .pdf or .svg")
    check_writable(out, "--report")


def draw(data: DataSet, said: dict[str, Any], found: dict[str, SplitContents], out: Path) -> None:
    """Write the picture; `said` is what `describe` made of `found`."""
    save_figure(page(data, said, found), out, dpi=120)


def page(data: DataSet, said: dict[str, Any], found: dict[str, SplitContents]) -> Figure:
    """The picture, not written yet."""
    figure = Figure(figsize=(14, 8), layout="constrained")  # without pyplot: no screen needed
    axes = figure.subplot_mosaic(PANELS, width_ratios=[1, 1, 1.1])
    totals = ", ".join(f"{own['fragments']:,} {name}" for name, own in said["splits"].items())
    figure.suptitle(f"{data.folder.name}: {totals} fragments of {data.seq_length:,} bases")
    bases = _bases_by_group(data, found)
    _composition(axes["composition"], bases)
    _distribution(axes["gc"], {group: _gc(rows) for group, rows in bases.items()})
    axes["gc"].set(title="G and C of each fragment, N apart", xlabel="share of G and C")
    _distribution(
        axes["n"], {group: rows[:, -1] / data.seq_length for group, rows in bases.items()}
    )
    axes["n"].set(title="N of each fragment", xlabel="share of N", yscale="log")
    _strands(axes["strands"], said)
    _sources(axes["sources"], said)
    # One legend of the groups for all panels, below them.
    colours = [Patch(color=f"C{place}", label=group) for place, group in enumerate(bases)]
    figure.legend(handles=colours, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def _bases_by_group(data: DataSet, found: dict[str, SplitContents]) -> dict[str, np.ndarray]:
    """A, C, G, T and N of the fragments looked at, of all splits: [n, 5] for each group."""
    groups = np.array([sequence.source.split("/")[0] for sequence in data.sequences])
    return {
        group: np.concatenate(
            [split.bases[groups[split.looked_at] == group] for split in found.values()]
        )
        for group in data.facts.groups
    }


def _gc(bases: np.ndarray) -> np.ndarray:
    """The share of G and C in each fragment that has a base but N."""
    known = bases[:, :4].sum(axis=1)
    there = known > 0
    return (bases[there, 1] + bases[there, 2]) / known[there]


def _composition(axes: Axes, bases: dict[str, np.ndarray]) -> None:
    width = 0.8 / len(bases)
    for place, rows in enumerate(bases.values()):
        shares = rows.sum(axis=0) / max(rows.sum(), 1)
        left = np.arange(len(BASES)) + (place - (len(bases) - 1) / 2) * width
        bars = axes.bar(left, shares, width, color=f"C{place}")
        if len(bases) <= MOST_NUMBERED:
            numbers = [f"{100 * share:.1f}" for share in shares]
            upright = {"rotation": 90, "padding": 2} if len(bases) > 2 else {}
            axes.bar_label(bars, numbers, fontsize=7, **upright)
    axes.set_xticks(range(len(BASES)), BASES)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Composition, %")
    _tidy(axes)


def _distribution(axes: Axes, shares: dict[str, np.ndarray]) -> None:
    """Fragments by a share, a curve for each group, on common bins."""
    top = max((values.max() for values in shares.values() if len(values)), default=0)
    bottom = min((values.min() for values in shares.values() if len(values)), default=0)
    bins = np.linspace(bottom, max(top, bottom + 0.01), 51)
    for place, values in enumerate(shares.values()):
        axes.hist(values, bins, histtype="step", linewidth=1.6, color=f"C{place}")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel("fragments looked at")
    _tidy(axes)


def _strands(axes: Axes, said: dict[str, Any]) -> None:
    rows = [
        (f"{group}, {name}", own[name]["strands"])
        for group, own in said["groups"].items()
        for name in said["splits"]
    ]
    names = [name for name, _ in rows]
    left = np.zeros(len(rows))
    for strand, label, colour in (("+", "forward", "#4c8c5c"), ("-", "reverse", "#c98a3d")):
        shares = [strands[strand] / max(sum(strands.values()), 1) for _, strands in rows]
        axes.barh(names, shares, left=left, color=colour, label=label)
        left += shares
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Strands")
    _rows(axes, len(rows), 180)
    _tidy(axes)
    axes.legend(frameon=False, fontsize=8, **BELOW)


def _sources(axes: Axes, said: dict[str, Any]) -> None:
    """A bar for each source in its group's colour, the validation part paler; the largest ones."""
    colours = {group: f"C{place}" for place, group in enumerate(said["groups"])}
    sources = said["sources"]
    shown = sorted(sources, key=lambda key: -_fragments(sources[key], said))[:MOST_SOURCES]
    colour = [colours[key.split("/")[0]] for key in shown]
    left = np.zeros(len(shown))
    for place, name in enumerate(said["splits"]):
        counts = [sources[key][name]["fragments"] for key in shown]
        axes.barh(shown, counts, left=left, color=colour, alpha=1 - 0.5 * place)
        left += counts
    rest = len(sources) - len(shown)
    axes.set_title("Fragments by source")
    axes.set_xlabel(f"{rest} smaller sources left out" if rest else "")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _rows(axes, len(shown), 400)
    _tidy(axes)
    # Grey, as each group has a colour of its own.
    splits = [
        Patch(color="#606060", alpha=1 - 0.5 * place, label=name)
        for place, name in enumerate(said["splits"])
    ]
    axes.legend(handles=splits, frameon=False, fontsize=8, **BELOW)


def _fragments(source: dict[str, Any], said: dict[str, Any]) -> int:
    return sum(source[name]["fragments"] for name in said["splits"])


def _rows(axes: Axes, rows: int, points: float) -> None:
    """Bars from the top down, none higher than it need be, with names that fit into so many points
    of height."""
    axes.set_ylim(max(rows, FEWEST_ROWS) - 0.5, -0.5)
    axes.tick_params(axis="y", labelsize=min(9, points / rows))


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
