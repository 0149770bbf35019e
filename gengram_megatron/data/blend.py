"""Several data sets as one, in exact shares: which set has the sample at each position of a run.

Like `order.py` a function of the seed and the position alone, with no table. The sets are the
leaves of a binary tree. Each branch deals its samples to its two sides in blocks of BLOCK places:
how many of the first n blocks' samples go left is floor(n * BLOCK * share), exactly, and which
places of a block they are is drawn from the seed, so that no rank reads one set only because its
rows fall on every other sample. A side gets its samples in the order of their positions, so a
set's epoch is over before its next begins.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from gengram_megatron.data.order import GOLDEN_RATIO, SampleOrder, mix_bits

BLOCK = 16


class BlendOrder:
    """Samples of several sets, numbered through: those of the first set, then of the second, ...

    At any position a set has had at most BLOCK / 4 + 1 samples a level of the tree more or less
    than its share of them. A blend of one set is that set in its SampleOrder.

    Args:
        sizes: samples of each set.
        weights: of each set; its share is its weight over the sum of all.
        seed: of the run. Each set's order has a seed of its own, made from it.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction], seed: int):
        self._orders = [
            SampleOrder(size, seed + number * int(GOLDEN_RATIO))
            for number, size in enumerate(sizes)
        ]
        self._offsets = np.cumsum([0, *sizes])
        self._weights = list(weights)
        self._key = mix_bits(np.array([seed % 2**64], dtype=np.uint64))

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers in [0, sum(sizes)), int64, of the same shape as `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        sets, places = self._deal(positions.ravel(), 0, len(self._orders))
        samples = np.empty_like(places)
        for number, order in enumerate(self._orders):
            own = sets == number
            samples[own] = self._offsets[number] + order.take(places[own])
        return samples.reshape(positions.shape)

    def counts(self, total: int) -> list[int]:
        """How many of the first `total` samples are of each set."""
        return self._counts(total, 0, len(self._orders))

    def _counts(self, total: int, first: int, last: int) -> list[int]:
        if last - first == 1:
            return [total]
        middle = (first + last) // 2
        left = int(self._left(np.array([total]), first, middle, last)[0][0])
        return [*self._counts(left, first, middle), *self._counts(total - left, middle, last)]

    def _deal(self, places: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The set of each sample, and its place in that set's own row of samples, both [n].

        places: [n], of the samples in the row of the branch with the sets [first, last).
        """
        if last - first == 1:
            return np.full_like(places, first), places
        middle = (first + last) // 2
        before, goes_left = self._left(places, first, middle, last)
        sets, inner = np.empty_like(places), np.empty_like(places)
        sets[goes_left], inner[goes_left] = self._deal(before[goes_left], first, middle)
        right = ~goes_left
        sets[right], inner[right] = self._deal((places - before)[right], middle, last)
        return sets, inner

    def _left(
        self, places: np.ndarray, first: int, middle: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """For each place [n] of a branch: how many samples before it go to its left side, the sets
        [first, middle), and whether the one there does. Both [n]."""
        share = sum(self._weights[first:middle]) / sum(self._weights[first:last])
        blocks, within = np.divmod(places, BLOCK)
        start, end = _floor(blocks, BLOCK * share), _floor(blocks + 1, BLOCK * share)
        branch = mix_bits(self._key + np.uint64(first << 32 | last))
        keys = mix_bits(branch + blocks.astype(np.uint64))
        drawn = mix_bits(keys[:, None] + np.arange(BLOCK, dtype=np.uint64))
        chosen = drawn.argsort(axis=1, kind="stable") < (end - start)[:, None]
        before = start + (chosen & (np.arange(BLOCK) < within[:, None])).sum(axis=1)
        return before, chosen[np.arange(len(places)), within]


def _floor(counts: np.ndarray, factor: Fraction) -> np.ndarray:
    """floor(counts * factor), int64, in Python's own integers: a product may be of any size."""
    return (counts.astype(object) * factor.numerator // factor.denominator).astype(np.int64)
