"""Reads a sweep file, and makes the configs of its runs.

A sweep file is the config that all its runs share, with the additional section `sweep`, which says
what varies. Settings there override the rest of the file.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gengram_megatron.config.keys import Name, NonNegative, Positive, Section
from gengram_megatron.config.load import (
    check_tree,
    refuse_other_kinds,
    tree_at,
    with_overrides,
)
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import Tree, inline_yaml, read_tree
from gengram_megatron.errors import UserError

SEED = "run.seed"
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


class Sweep(Section):
    """The settings that vary between the runs of a sweep."""

    grid: dict[Name, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="lists of values by key; there is a run for every combination"
    )
    runs: dict[RunName, dict[Name, Any]] = Field(
        {}, description="further runs by name, each with its settings"
    )
    seeds: list[NonNegative] = Field(
        [], description="values of run.seed to repeat every run with; empty: only run.seed"
    )
    at_a_time: Positive | None = Field(
        None, description="how many runs of a Slurm array may run at the same time; null: all"
    )


class SweepFile(Section):
    """The part of a sweep file that is not the config of its runs."""

    sweep: Sweep


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        group: the name without the seed.
        settings: its settings in the sweep, by dotted key.
    """

    name: str
    group: str
    settings: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class Runs:
    """All runs of a sweep.

    Attributes:
        folder: run.dir of the file. Each run has a subfolder there with its name.
    """

    folder: Path
    runs: list[SweepRun]
    sweep: Sweep


def read_sweep(path: Path, overrides: list[str]) -> Runs:
    """Reads a sweep file, and returns its validated runs.

    Raises UserError with one line for each problem in the file or in a run.
    """
    tree = read_tree(path)
    refuse_other_kinds(tree, path, {*Config.model_fields, *SweepFile.model_fields})
    tree, problems = with_overrides(tree, overrides)
    if "sweep" not in tree.value:
        raise UserError(
            f"{path}: this is the config of a single run: use `gengram train {path}`, or give it a "
            "section sweep that says what varies"
        )
    shared = Tree({k: v for k, v in tree.value.items() if k != "sweep"}, tree.location)
    varied = Tree({k: v for k, v in tree.value.items() if k == "sweep"}, tree.location)
    sweep = check_tree(varied, path, SweepFile, problems).sweep
    members = [*_of_the_grid(varied), *_of_names(varied)]
    if not members:
        raise UserError(f"{path}: the sweep is empty; give sweep.grid or sweep.runs")
    members = [seeded for member in members for seeded in _with_seeds(member, varied)]
    _refuse_equal_names([member.name for member in members], path)
    runs = []
    for member in members:
        try:
            runs.append(_run(member, shared, path))
        except UserError as error:
            problems += str(error).splitlines()
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return Runs(Path(shared.nearest(("run", "dir")).value), runs, sweep)


@dataclass(frozen=True)
class _Member:
    """A run before its config is merged."""

    name: str
    group: str
    settings: dict[str, Tree]


def _of_the_grid(varied: Tree) -> list[_Member]:
    """Returns a run for every combination of the grid; the last key's values vary fastest."""
    grid = _group(varied, "grid")
    if not grid:
        return []
    combinations = product(*(values.value for values in grid.values()))
    settings = [dict(zip(grid, values)) for values in combinations]
    return [_Member(_name(values), _name(values), values) for values in settings]


def _of_names(varied: Tree) -> list[_Member]:
    runs = _group(varied, "runs").items()
    return [_Member(name, name, settings.value) for name, settings in runs]


def _with_seeds(member: _Member, varied: Tree) -> list[_Member]:
    """Returns the run once with each seed, or unchanged if there are no seeds."""
    seeds = varied.nearest(("sweep", "seeds"))
    if not isinstance(seeds.value, list) or not seeds.value:
        return [member]
    return [
        _Member(f"{member.name}_seed-{seed.value}", member.name, {**member.settings, SEED: seed})
        for seed in seeds.value
    ]


def _group(varied: Tree, name: str) -> dict[str, Tree]:
    group: dict[str, Tree] = varied.value["sweep"].value.get(name, Tree({}, "")).value
    return group


def _name(settings: dict[str, Tree]) -> str:
    """Returns a name such as layers-3-6-10_window-21. It has the last part of each key, or the
    whole key if the last part is not unique."""
    leaves = Counter(key.rsplit(".", 1)[-1] for key in settings)
    parts = []
    for key, value in settings.items():
        leaf = key.rsplit(".", 1)[-1]
        text = re.sub(r"[^A-Za-z0-9.+]+", "-", inline_yaml(value.plain())).strip("-")
        parts.append(f"{leaf if leaves[leaf] == 1 else key}-{text}")
    return "_".join(parts)


def _refuse_equal_names(names: list[str], path: Path) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(
            f"{path}: two runs of the sweep would share the folder {twice[0]}; "
            "remove one, or give it another name in sweep.runs"
        )


def _run(member: _Member, shared: Tree, path: Path) -> SweepRun:
    tree = shared
    for key, value in member.settings.items():
        parts = key.split(".")
        if not all(parts) or key in ("run", "run.dir", "sweep", "base"):
            raise UserError(
                f"{value.location}: {key!r} is not a key that a sweep can vary; "
                "keys are written with dots, as in model.gengram.window"
            )
        tree = tree.merged_with(tree_at(parts, value))
    folder = shared.nearest(("run", "dir"))
    if isinstance(folder.value, str):  # otherwise check_tree below reports it
        below = Tree(str(Path(folder.value) / member.name), folder.location)
        tree = tree.merged_with(tree_at(["run", "dir"], below))
    config = check_tree(tree, path, Config)
    settings = {key: value.plain() for key, value in member.settings.items()}
    return SweepRun(member.name, member.group, settings, config)
