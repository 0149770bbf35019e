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
) -> None:
    """Leave out fragments until the groups stand in the ratio of their weights in each split.

    `fates` holds each group's fragments and is changed in place. All fragments have the same
    length, so a ratio of fragments is one of tokens. The group that is scarcest for its weight
    keeps all it can; the others lose fragments at random, the seed deciding which. With
    `total_tokens` all lose them, until the training split has as many as go into that total;
    a fragment has `tokens`.
    """
    for split, left_out in LEFT_OUT.items():
        here = {group: np.flatnonzero(fate == split) for group, fate in fates.items()}
        for group, fragments in here.items():
            if len(fragments) < weights[group]:
                raise UserError(_too_few(split, group, weights[group], fates[group]))
        unit = min(len(fragments) // weights[group] for group, fragments in here.items())
        if split == Fate.TRAIN and total_tokens is not None:
            unit = _unit_of_total(here, weights, tokens, total_tokens)
        for place, (group, fragments) in enumerate(here.items()):
            surplus = len(fragments) - unit * weights[group]
            random = np.random.default_rng([seed, split, place])
            fates[group][random.choice(fragments, surplus, replace=False)] = left_out


def _unit_of_total(
    here: dict[str, np.ndarray], weights: dict[str, int], tokens: int, total_tokens: int
) -> int:
    """The fragments for each part of the weights that make up the total."""
    parts = sum(weights.values())
    unit = total_tokens // (parts * tokens)
    if unit == 0:
        raise UserError(
            f"total_tokens is {total_tokens:,}; it must be at least {parts * tokens:,}, one "
            f"fragment of {tokens:,} tokens for each part of the groups' weights"
        )
    most = min(len(fragments) // weights[group] for group, fragments in here.items())
    if unit > most:
        said = [
            _has(group, len(fragments) * tokens, unit * weights[group] * tokens)
            for group, fragments in here.items()
        ]
        raise UserError(
            f"total_tokens is {total_tokens:,}, and the sources hold fewer for the train split: "
            f"{'; '.join(said)}; add sources, ask for at most {most * parts * tokens:,}, or set "
            "total_tokens to null for all that there are"
        )
    return unit


def _has(group: str, have: int, need: int) -> str:
    """What a group has of what it needs, in tokens."""
    times = ceil(100 * need / have) / 100
    lack = f"would be repeated {times:,.2f} times" if need > have else "enough"
    return f"group {group} has {have:,} tokens of {need:,} ({lack})"


def _too_few(split: Fate, group: str, weight: int, fate: np.ndarray) -> str:
    """Say why a group has nothing to give."""
    kinds = (split, Fate.TOO_MANY_N, Fate.FAR_FROM_GENES, Fate.STRADDLES)
    have, n, far, straddle = (np.count_nonzero(fate == kind) for kind in kinds)
    return (
        f"group {group} has {have} fragments for the {split.name.lower()} split and needs at least "
        f"{weight}: of its {len(fate)} fragments {n} were dropped for too many N (max_n_fraction), "
        f"{far} for their distance from genes (gene_distance), and {straddle} for crossing the border of the validation split (validation)"
    )
