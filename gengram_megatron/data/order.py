"""The order in which a run sees its samples: a function of the seed and the position alone.

Nothing is stored, so a run of any size starts at once, resumes anywhere, and reads the same
samples in every parallel layout. An order is an object of some hundred bytes for 25 million
samples as for ten (a shuffled index of them would be 200 MB a process); to take a microbatch
of n samples costs some hundred bytes for each of the n while it is taken.
"""

import math
from typing import Protocol

import numpy as np

ROUNDS = 8
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


class Order(Protocol):
    """Which sample of a data set stands at each position of a run."""

    def take(self, positions: np.ndarray) -> np.ndarray:
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
        return int(self.take(np.array([position]))[0])

    def take(self, positions: np.ndarray) -> np.ndarray:
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
