"""The groups' shares of a split, exact to the fragment, and the size of the training split."""

from itertools import pairwise
from math import ceil
from typing import Literal

import numpy as np

from data_prep.fragment import Fate
from gengram_megatron.errors import UserError

LEFT_OUT = {
    Fate.TRAIN: Fate.LEFT_OUT_OF_TRAIN,
    Fate.VALIDATION: Fate.LEFT_OUT_OF_VALIDATION,
}

Weights = dict[str, int | Literal["size"]]
"""The weight of each group: a number for all of them, or size for all of them."""

WORTH_SAYING = 0.1
"""The share of a group that the weights may leave out without a sentence about it."""


def balance(
    fates: dict[str, np.ndarray],
    weights: Weights,
    seed: int,
    tokens: int,
    total_tokens: int | None,
    allow_fewer: bool = False,
) -> str | None:
    """Leave out fragments until the groups stand in the ratio of their weights in each split.

    `fates` holds each group's fragments and is changed in place. All fragments have the same
    length, so a ratio of fragments is one of tokens. The group that is scarcest for its weight
    keeps all it can; the others lose fragments at random, the seed deciding which. Where the
    weights are size, all keep all. With `total_tokens` all lose them, until the training split has
    as many as go into that total; a fragment has `tokens`. If the groups hold fewer, that is an
    error; with `allow_fewer` all that they hold is taken, and a sentence about it returned.
    """
    fewer = None
    for split, left_out in LEFT_OUT.items():
        have = {group: int(np.count_nonzero(fate == split)) for group, fate in fates.items()}
        for group, count in have.items():
            needed = 1 if weights[group] == "size" else weights[group]
            if count < needed:
                raise UserError(_too_few(split, group, needed, fates[group]))
        keep = _most(have, weights)
        if split == Fate.TRAIN and total_tokens is not None:
            most, keep = keep, _of_total(have, weights, tokens, total_tokens)
            if any(keep[group] > most[group] for group in have):
                fewer = _too_few_tokens(have, keep, tokens, total_tokens)
                if not allow_fewer:
                    raise UserError(f"{fewer}; {_remedy(sum(most.values()) * tokens)}")
                keep = most
        for place, (group, fate) in enumerate(fates.items()):
            surplus = have[group] - keep[group]
            random = np.random.default_rng([seed, split, place])
            # One group after the other: of millions of fragments, numbers take hundreds of MB.
            surplus_ones = random.choice(have[group], surplus, replace=False)
            fate[np.flatnonzero(fate == split)[surplus_ones]] = left_out
    return fewer


def loss_by_weights(fates: dict[str, np.ndarray], weights: Weights, tokens: int) -> str | None:
    """Say which groups lose much to their weights, and how to keep it; None if none does.

    `fates` is what balance has left. What total_tokens leaves out is not the weights' doing: as
    long as every group has fragments to spare, the mix could be larger.
    """
    if "size" in weights.values():
        return None
    losses = []
    for split, left_out in LEFT_OUT.items():
        used = {group: int(np.count_nonzero(fate == split)) for group, fate in fates.items()}
        lost = {group: int(np.count_nonzero(fate == left_out)) for group, fate in fates.items()}
        scarcest = min(lost, key=lambda group: lost[group] // weights[group])
        if lost[scarcest] >= weights[scarcest]:
            continue
        losses += [
            f"{_share(lost[group], used[group])} of group {group} is left out of the "
            f"{split.name.lower()} split ({lost[group]:,} fragments, {lost[group] * tokens:,} "
            f"tokens; used: {used[group]:,} fragments, {used[group] * tokens:,} tokens), because "
            f"group {scarcest} has no more for its weight"
            for group in fates
            if lost[group] >= weights[group]  # fewer is its own rest, not for another's lack
            and lost[group] > WORTH_SAYING * (lost[group] + used[group])
        ]
    if not losses:
        return None
    ratio = ", ".join(f"{group} {weight}" for group, weight in weights.items())
    return (
        f"by the weights ({ratio}), {'; '.join(losses)}. To use all of every group, set weight: "
        "size in each; to keep the ratio as well, build each group as a data set of its own and "
        "train on data.blend, which repeats the smaller ones"
    )


def _share(lost: int, used: int) -> str:
    """The lost part of a whole, in percent, never rounded up to all of it."""
    return f"{int(1000 * lost / (lost + used)) / 10} %"


def _most(have: dict[str, int], weights: Weights) -> dict[str, int]:
    """The most fragments of each group that make up a split, of those that it has."""
    if "size" in weights.values():
        return dict(have)
    unit = min(count // weights[group] for group, count in have.items())
    return {group: unit * weights[group] for group in have}


def _of_total(
    have: dict[str, int], weights: Weights, tokens: int, total_tokens: int
) -> dict[str, int]:
    """The fragments of each group that make up the total, whether it has them or not. By size they
    are in the ratio of what the groups have, exact to a fragment."""
    by_size = "size" in weights.values()
    parts = 1 if by_size else sum(weights.values())
    if total_tokens < parts * tokens:
        raise UserError(
            f"total_tokens is {total_tokens:,}; it must be at least {parts * tokens:,}, "
            f"{_least(by_size, tokens)}"
        )
    unit = total_tokens // (parts * tokens)
    if not by_size:
        return {group: unit * weights[group] for group in have}
    ends = np.cumsum([0, *have.values()]).tolist()
    ends = [unit * end // ends[-1] for end in ends]
    return {group: end - start for group, (start, end) in zip(have, pairwise(ends))}


def _least(by_size: bool, tokens: int) -> str:
    """Say in words what the smallest total is."""
    each = "" if by_size else " for each part of the groups' weights"
    return f"one fragment of {tokens:,} tokens{each}"


def _too_few_tokens(
    have: dict[str, int], keep: dict[str, int], tokens: int, total_tokens: int
) -> str:
    """Say what each group has of what the total takes from it."""
    said = [_has(group, count * tokens, keep[group] * tokens) for group, count in have.items()]
    return (
        f"total_tokens is {total_tokens:,}, and the sources hold fewer for the train split: "
        f"{'; '.join(said)}"
    )


def _remedy(possible: int) -> str:
    return (
        f"add sources, ask for at most {possible:,}, or set allow_fewer to true for all that "
        "there are"
    )


def _has(group: str, have: int, need: int) -> str:
    """What a group has of what it needs, in tokens."""
    times = ceil(100 * need / have) / 100
    lack = f"would be repeated {times:,.2f} times" if need > have else "enough"
    return f"group {group} has {have:,} tokens of {need:,} ({lack})"


def _too_few(split: Fate, group: str, weight: int, fate: np.ndarray) -> str:
    """Say where the fragments of a group have gone that has too few for a split."""
    other = Fate.VALIDATION if split == Fate.TRAIN else Fate.TRAIN
    elsewhere = {
        f"are in the {other.name.lower()} split (keys validation...)": (other, LEFT_OUT[other]),
        "cross the border between the splits": (Fate.STRADDLES,),
        "were dropped for too many N (max_n_fraction)": (Fate.TOO_MANY_N,),
        "were dropped for their distance from genes (gene_distance)": (Fate.FAR_FROM_GENES,),
    }
    counts = {words: int(np.isin(fate, fates).sum()) for words, fates in elsewhere.items()}
    gone = ", ".join(f"{count:,} {words}" for words, count in counts.items() if count)
    return (
        f"group {group} has {np.count_nonzero(fate == split)} fragments for the "
        f"{split.name.lower()} split and needs at least {weight}: of its {len(fate):,} fragments {gone}"
    )
