"""Markov models of DNA, counted on a data set's train split and scored on its validation split.

    python benchmarks/markov.py datasets/sample --orders 1,3,5

The losses are kept in the data set's folder, as markov.json, and the pictures of later runs on it
show them. What a language model has to beat. A model of order k gives the next base a probability
by the k bases before it, from counts with one added to each of the four bases (so a context that
training never saw gives each 1/4). Where there are fewer than k bases before it, because the
fragment starts or an N comes between, the longest context that there is decides. Scored are a
language model's own labels, the tokens after each fragment's first one, as far as they are A, C, G
or T.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gengram_megatron.data_set import read_manifest
from gengram_megatron.errors import EXIT_CODE, UserError, print_message
from gengram_megatron.runs.plot import write_markov_levels
from gengram_megatron.tokenizer import BASE_IDS

HIGHEST_ORDER = 12  # 4^13 counts of 8 bytes are half a gigabyte
BLOCK = 2048  # fragments at a time

_DIGIT = np.full(256, -1, dtype=np.int8)  # 0 to 3 for A C G T, -1 for all other tokens
_DIGIT[list(BASE_IDS[:4])] = range(4)


def markov_nats(folder: Path, orders: list[int]) -> dict[int, float]:
    """Mean negative log-likelihood of the validation labels, nats a base, for each order."""
    highest = max(orders)
    counts = [np.zeros(4 ** (order + 1), dtype=np.int64) for order in range(highest + 1)]
    for block in _blocks(folder, "train"):
        for order, grams, valid in _grams(block, highest):
            counts[order] += np.bincount(grams[valid], minlength=len(counts[order]))
    logs = [_log_probabilities(count) for count in counts]
    sums = dict.fromkeys(orders, 0.0)
    scored = 0
    for block in _blocks(folder, "validation"):
        score = np.zeros(block[:, 1:].shape)
        for order, grams, valid in _grams(block, highest):
            score[valid] = logs[order][grams[valid]]
            if order in sums:  # by now each label has the score of its longest context so far
                sums[order] -= score.sum()
        scored += np.count_nonzero(block[:, 1:] >= 0)
    return {order: float(total / scored) for order, total in sums.items()}


def keep(folder: Path, nats: dict[int, float]) -> None:
    """Write markov.json beside the data; a folder that cannot be written to is told of."""
    files = read_manifest(folder)["files"]
    checksums = {split: files[f"{split}.bin"]["sha256"] for split in ("train", "validation")}
    try:
        write_markov_levels(folder, checksums, nats)
    except OSError as error:
        print(f"not kept for the pictures of later runs: {error}", file=sys.stderr)


def _blocks(folder: Path, split: str) -> Iterator[np.ndarray]:
    """The fragments of a split as digits, some at a time: [fragments, seq_length + 1]."""
    length = read_manifest(folder)["settings"]["seq_length"] + 1
    tokens = np.memmap(Path(folder) / f"{split}.bin", dtype=np.uint8, mode="r").reshape(-1, length)
    for start in range(0, len(tokens), BLOCK):
        yield _DIGIT[tokens[start : start + BLOCK]]


def _grams(digits: np.ndarray, highest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each order, every label's number in base 4 together with the `order` tokens before it,
    and where these are all bases. The label is the last digit."""
    labels = digits[:, 1:]
    grams = labels.astype(np.int64)
    valid = labels >= 0
    yield 0, grams, valid
    for order in range(1, highest + 1):
        # The token `order` places before the labels; there is none for the first ones.
        earlier = np.full_like(labels, -1)
        earlier[:, order - 1 :] = digits[:, : digits.shape[1] - order]
        valid = valid & (earlier >= 0)
        grams = grams + earlier * np.int64(4**order)
        yield order, grams, valid


def _log_probabilities(counts: np.ndarray) -> np.ndarray:
    """Log probability of each context's next base, from counts with one added."""
    table = counts.reshape(-1, 4) + 1
    return np.log(table / table.sum(axis=1, keepdims=True)).ravel()


def _orders(text: str) -> list[int]:
    orders = [int(word) for word in text.split(",")]
    if not all(0 <= order <= HIGHEST_ORDER for order in orders):
        raise argparse.ArgumentTypeError(f"orders must lie between 0 and {HIGHEST_ORDER}")
    return orders


def main() -> None:
    """Print a line for each order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a data set that gengram-data built")
    parser.add_argument("--orders", type=_orders, default=[1, 3, 5], help="default: 1,3,5")
    arguments = parser.parse_args()
    try:
        scores = markov_nats(arguments.folder, arguments.orders)
        keep(arguments.folder, scores)
    except UserError as error:
        print_message(error)
        sys.exit(EXIT_CODE)
    for order, nats in scores.items():
        print(f"order {order}: {nats:.4f} nats a base, {nats / math.log(2):.4f} bits a base")


if __name__ == "__main__":
    main()
