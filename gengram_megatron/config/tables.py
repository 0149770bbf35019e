"""The memory tables that a config asks for: which there are, and how many rows each has.

Up to k = 8 a table is direct: a row for each of the 5^k k-mers, and no collisions. Above that a
k-mer's row is found by hashing, in the manner of DeepSeek's Engram (arXiv 2601.07372): several
tables a k, its heads, each with a share of the columns, a prime number of rows of its own and a hash
of its own, so that two k-mers that meet in one head hardly meet in another.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import count

from gengram_megatron.config.schema import Gengram

ALPHABET_SIZE = 5
LARGEST_DIRECT = 8


@dataclass(frozen=True)
class KmerTable:
    """One table of one layer.

    rows: of the whole table, over all ranks. columns: likewise; d_m, or d_m / heads.
    hash_seed: of a hashed table; None: a direct one.
    shared: a k-mer and its reverse complement have one row.
    """

    name: str
    k: int
    rows: int
    columns: int
    hash_seed: int | None = None
    shared: bool = False


def kmer_tables(gengram: Gengram) -> tuple[KmerTable, ...]:
    """All tables of a layer with memory, k after k. ValueError: more hashed tables than primes."""
    hashing = gengram.hashing
    return _tables(
        tuple(gengram.kmer_sizes),
        gengram.dim,
        gengram.share_reverse_complements,
        (hashing.rows, hashing.heads, hashing.seed),
    )


@cache  # asked for in every step
def _tables(sizes: tuple[int, ...], dim: int, shared: bool, hashing: tuple[int, int, int]):
    rows, heads, seed = hashing
    primes, tables = _primes_below(rows), []
    for k in sizes:
        if k <= LARGEST_DIRECT:
            tables.append(direct_table(k, dim, shared))
            continue
        for name in (f"k{k}_{head}" for head in range(heads)):
            own = _hash_seed(seed, name)
            tables.append(KmerTable(name, k, next(primes), dim // heads, own, shared))
    return tuple(tables)


def direct_table(k: int, columns: int, shared: bool = False) -> KmerTable:
    """The table that has a row for each k-mer, or for each pair of reverse complements."""
    rows = ALPHABET_SIZE**k
    if shared:
        # Those that are their own reverse complement: the first half decides the second, and an
        # odd k has N, its own complement, in the middle.
        rows = (rows + ALPHABET_SIZE ** (k // 2)) // 2
    return KmerTable(f"k{k}", k, rows, columns, shared=shared)


def _hash_seed(seed: int, name: str) -> int:
    """63 bits that depend on nothing but the config."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _primes_below(limit: int):
    """Primes from the largest that is at most `limit` downwards."""
    return (n for n in count(limit, -1) if _is_prime(n))


def _is_prime(n: int) -> bool:
    if n < 2:
        raise ValueError("there are no more primes")
    return all(n % d for d in range(2, int(n**0.5) + 1))
