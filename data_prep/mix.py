"""The groups' shares of a split, exact to the fragment."""

import numpy as np

from data_prep.fragment import Fate
from gengram_megatron.errors import UserError

LEFT_OUT = {
    Fate.TRAIN: Fate.LEFT_OUT_OF_TRAIN,
    Fate.VALIDATION: Fate.LEFT_OUT_OF_VALIDATION,
}


def balance(fates: dict[str, np.ndarray], weights: dict[str, int], seed: int) -> None:
    """Leave out fragments until the groups stand in the ratio of their weights in each split.

    `fates` holds each group's fragments and is changed in place. All fragments have the same
    length, so a ratio of fragments is one of tokens. The group that is scarcest for its weight
    keeps all it can; the others lose fragments at random, the seed deciding which.
    """
    for split, left_out in LEFT_OUT.items():
        here = {group: np.flatnonzero(fate == split) for group, fate in fates.items()}
        for group, fragments in here.items():
            if len(fragments) < weights[group]:
                raise UserError(_too_few(split, group, weights[group], fates[group]))
        unit = min(len(fragments) // weights[group] for group, fragments in here.items())
        for place, (group, fragments) in enumerate(here.items()):
            surplus = len(fragments) - unit * weights[group]
            random = np.random.default_rng([seed, split, place])
            fates[group][random.choice(fragments, surplus, replace=False)] = left_out


def _too_few(split: Fate, group: str, weight: int, fate: np.ndarray) -> str:
    """Say why a group has nothing to give."""
    kinds = (split, Fate.TOO_MANY_N, Fate.FAR_FROM_GENES, Fate.STRADDLES)
    have, n, far, straddle = (np.count_nonzero(fate == kind) for kind in kinds)
    return (
        f"group {group} has {have} fragments for the {split.name.lower()} split and needs at least "
        f"{weight}: of its {len(fate)} fragments {n} were dropped for too many N (max_n_fraction), "
        f"{far} for their distance from genes (gene_distance), and {straddle} for crossing the border of the validation split (validation)"
    )
