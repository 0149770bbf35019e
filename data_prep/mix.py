"""The groups' shares of a split, exact to the fragment, and the size of the training split."""

from math import ceil

import numpy as np

from data_prep.fragment import Fate
from gengram_megatron.errors import UserError

LEFT_OUT = {
    Fate.TRAIN: Fate.LEFT_OUT_OF_TRAIN,
    Fate.VALIDATION: Fate.LEFT_OUT_OF_VALIDATION,
}


def balance(
    fates: dict[str, np.ndarray],
    weights: dict[str, int],
    seed: int,
    tokens: int,
    total_tokens: int | None,
    allow_fewer: bool = False,
) -> str | None:
    """Leave out fragments until the groups stand in the ratio of their weights in each split.

    `fates` holds each group's fragments and is changed in place. All fragments have the same
    length, so a ratio of fragments is one of tokens. The group that is scarcest for its weight
    keeps all it can; the others lose fragments at random, the seed deciding which. With
    `total_tokens` all lose them, until the training split has as many as go into that total;
    a fragment has `tokens`. If the groups hold fewer, that is an error; with `allow_fewer` all
    that they hold is taken, and a sentence about it returned.
    """
    fewer = None
    for split, left_out in LEFT_OUT.items():
        have = {group: int(np.count_nonzero(fate == split)) for group, fate in fates.items()}
        for group, count in have.items():
            if count < weights[group]:
                raise UserError(_too_few(split, group, weights[group], fates[group]))
        unit = min(count // weights[group] for group, count in have.items())
        if split == Fate.TRAIN and total_tokens is not None:
            most, unit = unit, _unit_of_total(weights, tokens, total_tokens)
            if unit > most:
                fewer = _too_few_tokens(have, weights, tokens, unit, total_tokens)
                if not allow_fewer:
                    raise UserError(f"{fewer}; {_remedy(most, weights, tokens)}")
                unit = most
        for place, (group, fate) in enumerate(fates.items()):
            surplus = have[group] - unit * weights[group]
            random = np.random.default_rng([seed, split, place])
            # One group after the other: of millions of fragments, numbers take hundreds of MB.
            surplus_ones = random.choice(have[group], surplus, replace=False)
            fate[np.flatnonzero(fate == split)[surplus_ones]] = left_out
    return fewer


def _unit_of_total(weights: dict[str, int], tokens: int, total_tokens: int) -> int:
    """The fragments for each part of the weights that make up the total."""
    parts = sum(weights.values())
    if total_tokens < parts * tokens:
        raise UserError(
            f"total_tokens is {total_tokens:,}; it must be at least {parts * tokens:,}, one "
            f"fragment of {tokens:,} tokens for each part of the groups' weights"
        )
    return total_tokens // (parts * tokens)


def _too_few_tokens(
    have: dict[str, int], weights: dict[str, int], tokens: int, unit: int, total_tokens: int
) -> str:
    """Say what each group has of what the total takes from it."""
    said = [
        _has(group, count * tokens, unit * weights[group] * tokens) for group, count in have.items()
    ]
    return (
        f"total_tokens is {total_tokens:,}, and the sources hold fewer for the train split: "
        f"{'; '.join(said)}"
    )


def _remedy(most: int, weights: dict[str, int], tokens: int) -> str:
    possible = most * sum(weights.values()) * tokens
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
