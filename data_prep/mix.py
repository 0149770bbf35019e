"""The mix of groups in each split, exact to the fragment, and the size of the training split."""

from itertools import pairwise
from math import ceil

import numpy as np

from data_prep.fragment import Fate
from gengram_megatron.errors import UserError

LEFT_OUT = {
    Fate.TRAIN: Fate.LEFT_OUT_OF_TRAIN,
    Fate.VALIDATION: Fate.LEFT_OUT_OF_VALIDATION,
}

Weights = dict[str, int] | None
"""The weight of each group; None: every group has the weight "size"."""

LOSS_WORTH_REPORTING = 0.1
"""The share of a group above which its loss to the weights is reported to the user."""


def balance(
    fates: dict[str, np.ndarray],
    weights: Weights,
    seed: int,
    tokens: int,
    total_tokens: int | None,
    allow_fewer: bool = False,
) -> str | None:
    """Leaves out fragments until the groups are in the ratio of their weights in each split.

    All fragments have the same length, so a ratio of fragments is a ratio of tokens. The group that
    is scarcest for its weight keeps all it can; the others lose fragments at random, and the seed
    decides which. Without weights, every group keeps everything. With `total_tokens`,
    groups lose fragments until the training split fits into that total.

    Args:
        fates: the fate of each fragment of each group, [fragments] uint8; changed in place.
        weights: the weight of each group.
        seed: decides which fragments are left out.
        tokens: the number of tokens of a fragment.
        total_tokens: the number of tokens that the training split may have; None for no limit.
        allow_fewer: if the groups hold fewer than `total_tokens`, use all they hold and return a
            sentence that says so. If false, this raises UserError.

    Raises UserError if a group has too few fragments for a split, or `total_tokens` is too small
    for one fragment of each part of the weights.
    """
    shortage = None
    for split, left_out in LEFT_OUT.items():
        available = {group: int(np.count_nonzero(fate == split)) for group, fate in fates.items()}
        for group, count in available.items():
            needed = 1 if weights is None else weights[group]
            if count < needed:
                raise UserError(_too_few(split, group, needed, fates[group]))
        kept = _largest_mix(available, weights)
        if split == Fate.TRAIN and total_tokens is not None:
            largest, kept = kept, _mix_for_total(available, weights, tokens, total_tokens)
            if any(kept[group] > largest[group] for group in available):
                shortage = _too_few_tokens(available, kept, tokens, total_tokens)
                if not allow_fewer:
                    raise UserError(f"{shortage}; {_remedy(sum(largest.values()) * tokens)}")
                kept = largest
        for index, (group, fate) in enumerate(fates.items()):
            surplus = available[group] - kept[group]
            random = np.random.default_rng([seed, split, index])
            # One group at a time: the indices of millions of fragments take hundreds of MB.
            dropped = random.choice(available[group], surplus, replace=False)
            fate[np.flatnonzero(fate == split)[dropped]] = left_out
    return shortage


def loss_by_weights(fates: dict[str, np.ndarray], weights: Weights, tokens: int) -> str | None:
    """Returns which groups lose much to the weights, and how to avoid it; None if none does.

    `fates` are those that `balance` has changed. Fragments that are left out because of
    total_tokens do not count: as long as every group has fragments to spare, the weights alone
    would allow a larger mix.
    """
    if weights is None:
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
            if lost[group] >= weights[group]  # fewer are its own remainder, not another's shortage
            and lost[group] > LOSS_WORTH_REPORTING * (lost[group] + used[group])
        ]
    if not losses:
        return None
    ratio = ", ".join(f"{group} {weight}" for group, weight in weights.items())
    return (
        f"with the weights ({ratio}), {'; '.join(losses)}. To use all of every group, set weight: "
        "size in each; to keep the ratio as well, build each group as a data set of its own and "
        "train on data.blend, which repeats the smaller ones"
    )


def _share(lost: int, used: int) -> str:
    """Returns the lost share in percent, rounded down: it is 100 only if nothing is used."""
    return f"{int(1000 * lost / (lost + used)) / 10} %"


def _largest_mix(available: dict[str, int], weights: Weights) -> dict[str, int]:
    """Returns the number of fragments of each group in the largest mix that the available ones
    allow."""
    if weights is None:
        return dict(available)
    unit = min(count // weights[group] for group, count in available.items())
    return {group: unit * weights[group] for group in available}


def _mix_for_total(
    available: dict[str, int], weights: Weights, tokens: int, total_tokens: int
) -> dict[str, int]:
    """Returns the number of fragments of each group that make up the total, whether the group has
    that many or not.

    Without weights they are in the ratio of what the groups have, exact to a fragment.
    """
    parts = 1 if weights is None else sum(weights.values())
    if total_tokens < parts * tokens:
        raise UserError(
            f"total_tokens is {total_tokens:,}; it must be at least {parts * tokens:,}, "
            f"{_smallest_total(weights, tokens)}"
        )
    unit = total_tokens // (parts * tokens)
    if weights is not None:
        return {group: unit * weights[group] for group in available}
    ends = np.cumsum([0, *available.values()]).tolist()
    ends = [unit * end // ends[-1] for end in ends]
    return {group: end - start for group, (start, end) in zip(available, pairwise(ends))}


def _smallest_total(weights: Weights, tokens: int) -> str:
    """Returns the smallest possible total in words."""
    each = "" if weights is None else " for each part of the groups' weights"
    return f"one fragment of {tokens:,} tokens{each}"


def _too_few_tokens(
    available: dict[str, int], needed: dict[str, int], tokens: int, total_tokens: int
) -> str:
    """Returns, in words, how many tokens each group has of those that the total needs from it."""
    by_group = [
        _available_of_needed(group, count * tokens, needed[group] * tokens)
        for group, count in available.items()
    ]
    return (
        f"total_tokens is {total_tokens:,}, but the sources hold fewer for the train split: "
        f"{'; '.join(by_group)}"
    )


def _remedy(possible: int) -> str:
    return (
        f"add sources, set total_tokens to at most {possible:,}, or set allow_fewer to true to use "
        "all that they hold"
    )


def _available_of_needed(group: str, available: int, needed: int) -> str:
    """Returns, in words, how many of the tokens that it needs a group has."""
    times = ceil(100 * needed / available) / 100
    verdict = f"would be repeated {times:,.2f} times" if needed > available else "enough"
    return f"group {group} has {available:,} tokens of {needed:,} ({verdict})"


def _too_few(split: Fate, group: str, weight: int, fate: np.ndarray) -> str:
    """Returns an error text for a group with too few fragments for a split: where its fragments
    went."""
    other = Fate.VALIDATION if split == Fate.TRAIN else Fate.TRAIN
    elsewhere = {
        f"are in the {other.name.lower()} split (keys validation...)": (other, LEFT_OUT[other]),
        "cross the border between the splits": (Fate.STRADDLES,),
        "were dropped for too many N (max_n_fraction)": (Fate.TOO_MANY_N,),
        "were dropped for their distance from genes (gene_distance)": (Fate.FAR_FROM_GENES,),
    }
    counts = {words: int(np.isin(fate, fates).sum()) for words, fates in elsewhere.items()}
    where = ", ".join(f"{count:,} {words}" for words, count in counts.items() if count)
    return (
        f"group {group} has {np.count_nonzero(fate == split)} fragments for the "
        f"{split.name.lower()} split and needs at least {weight}: of its {len(fate):,} fragments "
        f"{where}"
    )
