"""`manifest.json`: what a data set was made from, how, and what it holds.

It contains no time, user or machine, so the same build gives the same bytes. FATES connects the
names that it has for what became of the fragments with the columns of all tables.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.table import Table

from data_prep.schema import DataConfig
from gengram_megatron import __version__
from gengram_megatron.data_set import FORMAT, MANIFEST, read_manifest
from gengram_megatron.files import checksum
from gengram_megatron.tokenizer import BASE_IDS, BASES, EOD

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
"""For each column of a table: the fates that it counts, as the manifest calls them, and why such
fragments are dropped (None if they are used)."""


def add_fates(table: Table, counts: Sequence[Mapping[str, int]]) -> list[list[str]]:
    """Adds a column for each fate that any fragment has, and explains the columns in the caption.

    Args:
        table: the table, which has no rows yet.
        counts: the number of fragments by fate, for each row.

    Returns the cells of these columns for each row.
    """
    shown = {
        heading: fates
        for heading, (fates, why) in FATES.items()
        if why is None or any(row[fate] for row in counts for fate in fates)
    }
    for heading in shown:
        table.add_column(heading, justify="right")
    reasons = [f"{heading}, {FATES[heading][1]}" for heading in shown if FATES[heading][1]]
    table.caption = f"Not used: {'; '.join(reasons)}." if reasons else None
    return [[f"{sum(row[fate] for fate in fates):,}" for fates in shown.values()] for row in counts]


def file_facts(path: Path) -> dict[str, Any]:
    """Returns the size in bytes and the SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def settings_of(config: DataConfig) -> dict[str, Any]:
    """Returns the settings that decide a data set's content: all but `output` and `workers`."""
    return config.model_dump(mode="json", exclude={"output", "workers"})


def write_manifest(
    folder: Path,
    config: DataConfig,
    sources: dict[str, dict[str, Any]],
    groups: dict[str, dict[str, int]],
    splits: dict[str, dict[str, int]],
    known: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Writes the manifest of a folder whose other files are complete, and returns it.

    Args:
        folder: the folder of the data set.
        config: its config.
        sources: what the manifest says of each source, by group/name.
        groups: the counts of each group, by name.
        splits: the counts of each split, by name.
        known: size and checksum of the files for which they need not be computed again, by name.
    """
    files = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    manifest = {
        "format": FORMAT,
        "settings": settings_of(config),
        "tokens": {**dict(zip(BASES, BASE_IDS)), "EOD": EOD},
        "splits": splits,
        "groups": groups,
        "sources": sources,
        "files": {path.name: known.get(path.name) or file_facts(path) for path in files},
        "software": {
            "gengram-megatron": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "xopen")},
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def difference(
    folder: Path, config: DataConfig, facts_of_sources: Callable[[], dict[str, dict[str, Any]]]
) -> str | None:
    """Returns how a data set differs from what a build with this config and these source files
    would write, as the end of a sentence; None if it is up to date.

    Its files are compared by size only: reading all of them is what `gengram-data verify` does. The
    sources are read only if everything else agrees.
    """
    recorded, settings = read_manifest(folder), settings_of(config)
    earlier = _with_defaults(recorded["settings"], config)
    differing = [key for key in settings if settings[key] != earlier.get(key)]
    if differing:
        return f"was built with other settings ({', '.join(differing)})"
    damaged = [
        name
        for name, facts in recorded["files"].items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != facts["bytes"]
    ]
    if damaged:
        return f"is damaged ({', '.join(damaged)})"
    current = facts_of_sources()
    changed = [
        key
        for key in dict.fromkeys([*recorded["sources"], *current])
        if not _contains(recorded["sources"].get(key), current.get(key))
    ]
    return f"was built from other sources ({', '.join(changed)} changed)" if changed else None


def _with_defaults(settings: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Returns the settings of a manifest, with the keys that were added in later versions set to
    values that describe the same data set.

    A data set from before validation_blocks was split by the rule that is now called 1. If nothing
    was held out by a share, the number makes no difference, and that of `config` is used.
    """
    by_share = any(
        source.is_split_by_share(config.validation_headers)
        for group in config.groups.values()
        for source in group.sources.values()
    )
    blocks = 1 if by_share else config.validation_blocks
    try:
        complete = {"validation_blocks": blocks, **settings, "output": "any"}
        return settings_of(DataConfig.model_validate(complete))
    except ValidationError:
        return settings


def _contains(recorded: dict[str, Any] | None, facts: dict[str, Any] | None) -> bool:
    """Returns whether what the manifest recorded of a source includes all of these facts."""
    if recorded is None or facts is None:
        return False
    return all(recorded.get(name) == fact for name, fact in facts.items())
