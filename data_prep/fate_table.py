"""What became of the fragments, in the words that all tables use."""

from collections.abc import Mapping, Sequence

from rich.table import Table

FATES = {
    "train": (("train",), None),
    "validation": (("validation",), None),
    "left out": (
        ("left_out_of_train", "left_out_of_validation"),
        "for the groups' weights or total_tokens",
    ),
    "too many N": (("too_many_n",), "more than max_n_fraction allows"),
    "far from genes": (("far_from_genes",), "farther than gene_distance"),
    "straddles": (("straddles",), "on both sides of a border between train and validation"),
}
"""Of each column of a table, the fates that it counts, as the manifest calls them, and why fragments
are dropped there."""


def add_fates(table: Table, counts: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """Add a column for each fate that any fragment has, and say in the caption what it means.

    Args:
        counts: fragments by fate, of each row.

    Returns the cells of these columns for each row.
    """
    shown = {
        heading: fates
        for heading, (fates, why) in FATES.items()
        if why is None or any(own[fate] for own in counts for fate in fates)
    }
    for heading in shown:
        table.add_column(heading, justify="right")
    reasons = [f"{heading}, {FATES[heading][1]}" for heading in shown if FATES[heading][1]]
    table.caption = f"Not used: {'; '.join(reasons)}." if reasons else None
    return [[f"{sum(own[fate] for fate in fates):,}" for fates in shown.values()] for own in counts]
