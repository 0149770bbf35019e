"""The order in which a run sees its samples: a function of the seed and the position alone.

Nothing is stored, so a run of any size starts at once, resumes anywhere, and reads the same
samples in every parallel layout. An order is an object of some hundred bytes for 25 million
samples as for ten (a shuffled index of them would be 200 MB a process); to take a microbatch
of n samples costs some hundred bytes for each of the n while it is taken.

`SampleOrder` is the order of one data set, `BlendOrder` that of several in exact shares: which set
has the sample at each position of a run. The sets are the leaves of a binary tree. Each branch
deals its samples to its two sides in blocks of BLOCK places: how many of the first n blocks'
samples go left is floor(n * BLOCK * share), exactly, and which places of a block they are is drawn
from the seed, so that no rank reads one set only because its rows fall on every other sample. A
side gets its samples in the order of their positions, so a set's epoch is over before its next
begins.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

ROUNDS = 8
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


class Order(Protocol):
    """Which sample of a data set stands at each position of a run."""

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers, int64, of the same shape as `positions`."""
        ...


class SampleOrder:
    """Every sample once an epoch, each epoch in another order.

    A position counts samples since the start of the run; its epoch is position // num_samples.
    Within an epoch the order is a bijection of [0, num_samples), computed and never stored: the
    samples lie on a grid of about sqrt(n) x sqrt(n), and each round turns every column by an
    amount hashed from the column's number, then swaps rows and columns (a Feistel network with
    additions in place of exclusive ors). Each round can be undone, so the whole can.
    """

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {num_samples}")
        self.num_samples = num_samples
        self._rows = math.isqrt(num_samples - 1) + 1
        self._columns = -(-num_samples // self._rows)
        self._key = mix_bits(np.array([seed % 2**64], dtype=np.uint64))

    def __getitem__(self, position: int) -> int:
        """The sample at one position."""
        return int(self.samples_at(np.array([position]))[0])

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers in [0, num_samples), int64, of the same shape as `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions.ravel(), self.num_samples)
        keys = mix_bits(self._key + epochs.astype(np.uint64) * GOLDEN_RATIO)
        samples = self._permute(places.astype(np.uint64), keys)
        # The grid has a few more cells than there are samples. A place that lands on one of them
        # is permuted again until it does not, which keeps the map a bijection ("cycle walking").
        while (outside := np.flatnonzero(samples >= self.num_samples)).size:
            samples[outside] = self._permute(samples[outside], keys[outside])
        return samples.astype(np.int64).reshape(positions.shape)

    def _permute(self, cells: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """A bijection of [0, rows * columns) for each key."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(cells, columns)
        for _ in range(ROUNDS):
            keys = mix_bits(keys)
            row = (row + mix_bits(keys ^ column) % rows) % rows
            row, column, rows, columns = column, row, columns, rows
        # An even number of rounds: rows and columns are back in their own places.
        return row * columns + column


def mix_bits(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64: a bijection of uint64 in which every input bit changes
    about half of the output bits. Arrays only: numpy warns where a uint64 scalar wraps around."""
    values = values + GOLDEN_RATIO
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


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

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers in [0, sum(sizes)), int64, of the same shape as `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        sets, places = self._deal(positions.ravel(), 0, len(self._orders))
        samples = np.empty_like(places)
        for number, order in enumerate(self._orders):
            own = sets == number
            samples[own] = self._offsets[number] + order.samples_at(places[own])
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
