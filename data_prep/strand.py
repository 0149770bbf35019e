"""Which fragments are written as their reverse complement, and how."""

import hashlib

import numpy as np

from gengram_megatron.tokenizer import EOD, DnaTokenizer


def _complements() -> np.ndarray:
    """The complement of each token id; those that are no base stay."""
    table = np.arange(EOD + 1, dtype=np.uint8)
    table[DnaTokenizer().encode("ACGTN")] = DnaTokenizer().encode("TGCAN")
    return table


_COMPLEMENTS = _complements()


def draw_reversed(seed: int, source: str, record: str, count: int, share: float) -> np.ndarray:
    """Whether each of the `count` fragments of a record's grid is turned, with probability
    `share`: [count] bool.

    Philox counts instead of keeping a state: its i-th number is a hash of i under its key, here
    the seed, source and record. So a fragment's strand hangs on its place alone, not on which
    others are there or on the order of work.
    """
    place = "\0".join((str(seed), source, record)).encode()
    key = int.from_bytes(hashlib.blake2b(place, digest_size=16).digest(), "little")
    uniform = (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53
    return uniform < share


def reverse_complement(fragments: np.ndarray, reverse: np.ndarray) -> np.ndarray:
    """Fragments [count, seq_length] of token ids, those of `reverse` [count] turned; the same array if
    there are none."""
    if not reverse.any():
        return fragments
    turned = fragments.copy()
    turned[reverse] = _COMPLEMENTS[fragments[reverse, ::-1]]
    return turned
