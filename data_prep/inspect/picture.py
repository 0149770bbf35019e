"""Draws one page that shows what is in a data set."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from matplotlib.typing import HashableList

from data_prep.inspect.contents import SplitContents
from data_prep.inspect.opened import DataSet
from gengram_megatron.errors import UserError
from gengram_megatron.files import check_writable, save_figure
from gengram_megatron.tokenizer import BASES

MAX_SOURCES = 30  # more bars would be unreadable
MAX_LABELLED_GROUPS = 5  # with more groups there is no room for numbers above the bars
MIN_ROWS = 8  # a panel of bars has room for at least this many, so that one bar does not fill it
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.08), "ncols": 2}
"""The position of a panel's legend: below its axes, where it hides no bar."""
PANELS: list[HashableList[str]] = [["composition", "gc", "sources"], ["n", "strands", "sources"]]


def check_ending(out: Path) -> None:
    """Raises UserError unless a picture can be written under this name."""
    endings = Figure().canvas.get_supported_filetypes()
    if out.suffix[1:] not in endings:
        raise UserError(f"--report {out}: the name must end in .png, .pdf or .svg")
    check_writable(out, "--report")


def draw(
    data: DataSet,
    description: dict[str, Any],
    split_contents: dict[str, SplitContents],
    out: Path,
) -> None:
    """Writes the picture to a file.

    Args:
        data: the data set.
        description: what `describe` made of `split_contents`.
        split_contents: what `contents` returned.
        out: the file; its ending decides the format.
    """
    save_figure(page(data, description, split_contents), out, dpi=120)


def page(
    data: DataSet, description: dict[str, Any], split_contents: dict[str, SplitContents]
) -> Figure:
    """Returns the picture without writing it; the arguments are those of `draw`."""
    figure = Figure(figsize=(14, 8), layout="constrained")  # without pyplot, which needs a display
    axes = figure.subplot_mosaic(PANELS, width_ratios=[1, 1, 1.1])
    splits = description["splits"].items()
    totals = ", ".join(f"{split['fragments']:,} {name}" for name, split in splits)
    figure.suptitle(f"{data.folder.name}: {totals} fragments of {data.seq_length:,} bases")
    bases = _bases_by_group(data, split_contents)
    _composition(axes["composition"], bases)
    _distribution(axes["gc"], {group: _gc(rows) for group, rows in bases.items()})
    axes["gc"].set(title="G and C of each fragment, N apart", xlabel="share of G and C")
    _distribution(
        axes["n"], {group: rows[:, -1] / data.seq_length for group, rows in bases.items()}
    )
    axes["n"].set(title="N of each fragment", xlabel="share of N", yscale="log")
    _strands(axes["strands"], description)
    _sources(axes["sources"], description)
    # One legend of the groups for all panels, below them.
    colours = [Patch(color=f"C{index}", label=group) for index, group in enumerate(bases)]
    figure.legend(handles=colours, loc="outside lower center", ncols=8, frameon=False, fontsize=8)
    return figure


def _bases_by_group(
    data: DataSet, split_contents: dict[str, SplitContents]
) -> dict[str, np.ndarray]:
    """Returns for each group the number of A, C, G, T and N in each sampled fragment of all splits,
    [n, 5]."""
    groups = np.array([sequence.source.split("/")[0] for sequence in data.sequences])
    return {
        group: np.concatenate(
            [split.bases[groups[split.sampled] == group] for split in split_contents.values()]
        )
        for group in data.facts.groups
    }


def _gc(bases: np.ndarray) -> np.ndarray:
    """Returns the share of G and C in each fragment that is not entirely N."""
    known = bases[:, :4].sum(axis=1)
    has_bases = known > 0
    shares: np.ndarray = (bases[has_bases, 1] + bases[has_bases, 2]) / known[has_bases]
    return shares


def _composition(axes: Axes, bases: dict[str, np.ndarray]) -> None:
    width = 0.8 / len(bases)
    for index, rows in enumerate(bases.values()):
        shares = rows.sum(axis=0) / max(rows.sum(), 1)
        positions = np.arange(len(BASES)) + (index - (len(bases) - 1) / 2) * width
        bars = axes.bar(positions, shares, width, color=f"C{index}")
        if len(bases) <= MAX_LABELLED_GROUPS:
            numbers = [f"{100 * share:.1f}" for share in shares]
            rotation, padding = (90, 2) if len(bases) > 2 else (0, 0)
            axes.bar_label(bars, numbers, fontsize=7, rotation=rotation, padding=padding)
    axes.set_xticks(range(len(BASES)), BASES)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Composition, %")
    _tidy(axes)


def _distribution(axes: Axes, shares: dict[str, np.ndarray]) -> None:
    """Draws the distribution of a share over fragments, a curve for each group, on common bins."""
    top = max((values.max() for values in shares.values() if len(values)), default=0)
    bottom = min((values.min() for values in shares.values() if len(values)), default=0)
    bins = np.linspace(bottom, max(top, bottom + 0.01), 51).tolist()
    for index, values in enumerate(shares.values()):
        axes.hist(values, bins, histtype="step", linewidth=1.6, color=f"C{index}")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylabel("sampled fragments")
    _tidy(axes)


def _strands(axes: Axes, description: dict[str, Any]) -> None:
    rows = [
        (f"{group}, {name}", splits[name]["strands"])
        for group, splits in description["groups"].items()
        for name in description["splits"]
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


def _sources(axes: Axes, description: dict[str, Any]) -> None:
    """Draws a bar for each of the largest sources in its group's colour, paler for validation."""
    colours = {group: f"C{index}" for index, group in enumerate(description["groups"])}
    sources = description["sources"]
    shown = sorted(sources, key=lambda key: -_fragments(sources[key], description))[:MAX_SOURCES]
    colour = [colours[key.split("/")[0]] for key in shown]
    left = np.zeros(len(shown))
    for index, name in enumerate(description["splits"]):
        counts = [sources[key][name]["fragments"] for key in shown]
        axes.barh(shown, counts, left=left, color=colour, alpha=1 - 0.5 * index)
        left += counts
    omitted = len(sources) - len(shown)
    axes.set_title("Fragments by source")
    axes.set_xlabel(f"{omitted} smaller sources left out" if omitted else "")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _rows(axes, len(shown), 400)
    _tidy(axes)
    # Grey, because each group has its own colour.
    splits = [
        Patch(color="#606060", alpha=1 - 0.5 * index, label=name)
        for index, name in enumerate(description["splits"])
    ]
    axes.legend(handles=splits, frameon=False, fontsize=8, **BELOW)


def _fragments(source: dict[str, Any], description: dict[str, Any]) -> int:
    return sum(source[name]["fragments"] for name in description["splits"])


def _rows(axes: Axes, rows: int, points: float) -> None:
    """Arranges bars from the top down, not thicker than necessary, and shrinks their names so that
    all of them together fit into `points` of height."""
    axes.set_ylim(max(rows, MIN_ROWS) - 0.5, -0.5)
    axes.tick_params(axis="y", labelsize=min(9, points / rows))


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
