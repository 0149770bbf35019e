"""The samples of a run: the fragments of a built data set, memory-mapped and read by number, and
the order in which a run sees them, a function of the seed and the position alone.

No order is stored, so a run of any size starts at once, resumes anywhere, and reads the same
samples in every parallel layout. An order is an object of a few hundred bytes, for 25 million
samples as for ten (a shuffled index would take 200 MB per process). Computing the numbers of n
samples takes a few hundred bytes per sample, for as long as the call lasts.

`FragmentDataset` is one split of a data set. `SampleOrder` is the order of one data set.
`BlendOrder` is the order of several sets in exact shares: it determines which set provides the
sample at each position of a run. The sets are the leaves of a binary tree. Each branch splits its
sequence of samples between its two sides in blocks of BLOCK samples. Exactly
floor(n * BLOCK * share) of the samples in the first n blocks go left; which ones within a block is
drawn from the seed, so that a rank does not read only one set because its rows fall on every other
sample. A side gets its samples in the order of their positions, so an epoch of a set ends before
its next one begins.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import Dataset

from gengram_megatron.data_set import (
    MANIFEST,
    DataFile,
    no_data_set,
    other_seq_length,
    read_manifest,
)
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS, BASES, EOD


class Samples(Protocol):
    """Samples by number, tokens [seq_length + 1], uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class FragmentDataset(Dataset[np.ndarray]):
    """One split of a data set that `gengram-data build` wrote. A fragment is a training sample.

    Args:
        folder: the data set's folder.
        split: "train" or "validation".
        seq_length: number of bases per sample that the model expects.
        key: the config key that names the folder, for error messages.

    Attributes:
        sha256: checksum of the fragments, from the data set's manifest.
        files: the files that hold the split, with their checksums from the manifest.
    """

    def __init__(self, folder: Path, split: str, seq_length: int, key: str = "data.path"):
        self._arguments = (folder, split, seq_length, key)
        self.folder, self.key = Path(folder), key
        manifest = _check(self.folder, split, seq_length, key)
        self.files = [
            DataFile(self.folder / name, manifest["files"][name]["sha256"])
            for name in (f"{split}.bin", f"{split}.idx")
        ]
        self.sha256: str = self.files[0].sha256
        self._fragments: Sequence[np.ndarray] = _open(Path(folder) / split)

    def __len__(self) -> int:
        return len(self._fragments)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns tokens [seq_length + 1], uint8: the bases and EOD. They are a read-only view of
        the file."""
        return self._fragments[index]

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that a loader spawns, rather than forks, opens the files again.
        return FragmentDataset, self._arguments


def _check(folder: Path, split: str, seq_length: int, key: str) -> dict[str, Any]:
    """Returns the manifest. Raises UserError unless the folder holds the complete split, with the
    sequence length that the model expects."""
    if not folder.is_dir():
        raise UserError(no_data_set(key, folder))
    manifest = read_manifest(folder)
    built_length = manifest["settings"]["seq_length"]
    if built_length != seq_length:
        raise UserError(other_seq_length(key, folder, built_length, seq_length))
    expected = {**dict(zip(BASES, BASE_IDS)), "EOD": EOD}
    if manifest["tokens"] != expected:
        raise UserError(
            f"{folder / MANIFEST} was made with the token ids {manifest['tokens']}, but this "
            f"version uses {expected}; build the data set again"
        )
    for name in (f"{split}.bin", f"{split}.idx"):
        _check_size(folder / name, manifest["files"].get(name))
    if not manifest["files"][f"{split}.bin"]["bytes"]:
        raise UserError(
            f"{key}: {folder} has no {split} samples; build the data set again, with a different "
            "share held out for validation"
        )
    return manifest


def _check_size(path: Path, facts: dict[str, Any] | None) -> None:
    """Raises UserError unless a file has the size given in the manifest. Checksums take reading all
    of it, so they are compared only once per data set, when a run starts (data_set.py)."""
    if facts is None:
        raise UserError(f"{path.parent / MANIFEST} lists no {path.name}; build the data set again")
    if not path.is_file():
        raise UserError(f"{path} is missing; build the data set again")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise UserError(
            f"{path} has {size:,} bytes and should have {facts['bytes']:,}: it was cut off or "
            f"changed; copy or build the data set again"
        )


def _open(prefix: Path) -> IndexedDataset:
    """Opens the split as megatron-core's IndexedDataset."""
    return IndexedDataset(str(prefix))


ROUNDS = 8
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


class Order(Protocol):
    """Determines which sample is at each position of a run."""

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns sample numbers, int64, in the same shape as `positions`."""
        ...


class SampleOrder:
    """Visits every sample once per epoch, in a different order each epoch.

    A position counts samples since the start of the run; its epoch is position // num_samples.
    Within an epoch the order is a bijection of [0, num_samples), computed and never stored: the
    samples are laid out on a grid of about sqrt(n) x sqrt(n), and each round rotates every column
    by an amount hashed from the column's number, then swaps rows and columns (a Feistel network
    with additions in place of exclusive ors). Each round can be inverted, so the whole can.
    """

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, not {num_samples}")
        self.num_samples = num_samples
        self._rows = math.isqrt(num_samples - 1) + 1
        self._columns = -(-num_samples // self._rows)
        self._key = splitmix64(np.array([seed % 2**64], dtype=np.uint64))

    def __getitem__(self, position: int) -> int:
        """Returns the number of the sample at one position."""
        return int(self.samples_at(np.array([position]))[0])

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns sample numbers in [0, num_samples), int64, in the same shape as `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, offsets = np.divmod(positions.ravel(), self.num_samples)
        keys = splitmix64(self._key + epochs.astype(np.uint64) * GOLDEN_RATIO)
        samples = self._permute(offsets.astype(np.uint64), keys)
        # The grid has a few more cells than there are samples. A number that lands on one of them
        # is permuted again until it does not, which keeps the map a bijection ("cycle walking").
        while (outside := np.flatnonzero(samples >= self.num_samples)).size:
            samples[outside] = self._permute(samples[outside], keys[outside])
        return samples.astype(np.int64).reshape(positions.shape)

    def _permute(self, cells: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Applies the bijection of [0, rows * columns) that each key determines."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(cells, columns)
        for _ in range(ROUNDS):
            keys = splitmix64(keys)
            row = (row + splitmix64(keys ^ column) % rows) % rows
            row, column, rows, columns = column, row, columns, rows
        # After an even number of rounds, rows and columns are no longer swapped.
        return row * columns + column


def splitmix64(values: np.ndarray) -> np.ndarray:
    """Computes the output function of splitmix64: a bijection of uint64 in which every input bit
    changes about half of the output bits. It is for arrays only, because numpy warns when a uint64
    scalar wraps around."""
    values = values + GOLDEN_RATIO
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


BLOCK = 16


class BlendOrder:
    """The order of a blend of several sets. Samples are numbered consecutively: first those of the
    first set, then those of the second, and so on.

    At any position the number of samples read from a set differs from its exact share by at most
    BLOCK / 4 + 1 for each level of the tree. A blend of one set is that set in its SampleOrder.

    Args:
        sizes: number of samples of each set.
        weights: weight of each set; its share is its weight divided by the sum of all weights.
        seed: the run's seed. The seed of each set's order is derived from it.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[Fraction], seed: int):
        self._orders = [
            SampleOrder(size, seed + number * int(GOLDEN_RATIO))
            for number, size in enumerate(sizes)
        ]
        self._offsets = np.cumsum([0, *sizes])
        self._weights = list(weights)
        self._key = splitmix64(np.array([seed % 2**64], dtype=np.uint64))

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """Returns sample numbers in [0, sum(sizes)), int64, in the same shape as `positions`."""
        positions = np.asarray(positions, dtype=np.int64)
        sets, set_positions = self._assign(positions.ravel(), 0, len(self._orders))
        samples = np.empty_like(set_positions)
        for number, order in enumerate(self._orders):
            in_set = sets == number
            samples[in_set] = self._offsets[number] + order.samples_at(set_positions[in_set])
        return samples.reshape(positions.shape)

    def counts(self, total: int) -> list[int]:
        """Returns how many of the first `total` samples come from each set."""
        return self._counts(total, 0, len(self._orders))

    def _counts(self, total: int, first: int, last: int) -> list[int]:
        if last - first == 1:
            return [total]
        middle = (first + last) // 2
        left = int(self._left(np.array([total]), first, middle, last)[0][0])
        return [*self._counts(left, first, middle), *self._counts(total - left, middle, last)]

    def _assign(
        self, positions: np.ndarray, first: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the set of each sample, and the sample's position among those of that set, both
        [n].

        positions: [n], among the samples of the branch with the sets [first, last).
        """
        if last - first == 1:
            return np.full_like(positions, first), positions
        middle = (first + last) // 2
        before, goes_left = self._left(positions, first, middle, last)
        sets, inner = np.empty_like(positions), np.empty_like(positions)
        sets[goes_left], inner[goes_left] = self._assign(before[goes_left], first, middle)
        right = ~goes_left
        sets[right], inner[right] = self._assign((positions - before)[right], middle, last)
        return sets, inner

    def _left(
        self, positions: np.ndarray, first: int, middle: int, last: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns for each position [n] in a branch how many samples before it go to the left side,
        the sets [first, middle), and whether the sample at the position does; both are [n]."""
        weights = self._weights
        share = sum(weights[first:middle], Fraction()) / sum(weights[first:last], Fraction())
        blocks, within = np.divmod(positions, BLOCK)
        start, end = _floor(blocks, BLOCK * share), _floor(blocks + 1, BLOCK * share)
        branch = splitmix64(self._key + np.uint64(first << 32 | last))
        keys = splitmix64(branch + blocks.astype(np.uint64))
        drawn = splitmix64(keys[:, None] + np.arange(BLOCK, dtype=np.uint64))
        chosen = drawn.argsort(axis=1, kind="stable") < (end - start)[:, None]
        before = start + (chosen & (np.arange(BLOCK) < within[:, None])).sum(axis=1)
        return before, chosen[np.arange(len(positions)), within]


def _floor(counts: np.ndarray, factor: Fraction) -> np.ndarray:
    """Returns floor(counts * factor), int64. It computes with Python integers, as a product may
    exceed 64 bits."""
    return (counts.astype(object) * factor.numerator // factor.denominator).astype(np.int64)
