"""The Gengram tables of a config, and how each is split over the ranks.

Up to k = 8 a table is direct: it has a row for each of the 5^k k-mers, without collisions. Above
that, rows are found by hashing, as in DeepSeek's Engram (arXiv 2601.07372): each k has several
tables, called heads. Each head has a share of the columns, and its own prime number of rows and
hash function, so two k-mers that collide in one head rarely collide in another.

A table is split by columns or by rows. By columns, a tensor-parallel rank holds d / tensor columns
of every row: a look-up needs no communication, but every rank of the data-parallel group has a
copy. By rows, a rank holds a range of rows, and rows are fetched from the ranks that hold them.
Split over the data- or expert-parallel group, no rank holds a whole table, its whole gradient or
its whole optimizer states.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Literal

from gengram_megatron.config.schema import Config, Gengram

ALPHABET_SIZE = 5
LARGEST_DIRECT = 8


@dataclass(frozen=True)
class KmerTable:
    """One table of one layer.

    Attributes:
        rows: number of rows over all ranks.
        columns: number of columns over all ranks: d_m, or d_m / heads for a hashed table.
        hash_seed: seed of the hash; None for a direct table.
        shared: whether a k-mer and its reverse complement share a row.
    """

    name: str
    k: int
    rows: int
    columns: int
    hash_seed: int | None = None
    shared: bool = False


def kmer_tables(gengram: Gengram) -> tuple[KmerTable, ...]:
    """Returns all tables of a Gengram layer in the order of kmer_sizes.

    Raises ValueError if there are more hashed tables than primes up to hashing.rows.
    """
    hashing = gengram.hashing
    return _tables(
        tuple(gengram.kmer_sizes),
        gengram.dim,
        gengram.share_reverse_complements,
        (hashing.rows, hashing.heads, hashing.seed),
    )


@cache  # called in every step
def _tables(
    sizes: tuple[int, ...], dim: int, shared: bool, hashing: tuple[int, int, int]
) -> tuple[KmerTable, ...]:
    rows, heads, seed = hashing
    primes = _primes_below(rows)
    tables: list[KmerTable] = []
    for k in sizes:
        if k <= LARGEST_DIRECT:
            tables.append(direct_table(k, dim, shared))
            continue
        for name in (f"k{k}_{head}" for head in range(heads)):
            hash_seed = _hash_seed(seed, name)
            tables.append(KmerTable(name, k, next(primes), dim // heads, hash_seed, shared))
    return tuple(tables)


def direct_table(k: int, columns: int, shared: bool = False) -> KmerTable:
    """Returns a table with a row for each k-mer, or, if shared, for each pair of reverse
    complements."""
    rows = ALPHABET_SIZE**k
    if shared:
        # 5^(k // 2) k-mers are their own reverse complement: the first half decides the second,
        # and for odd k the base in the middle is N, its own complement.
        rows = (rows + ALPHABET_SIZE ** (k // 2)) // 2
    return KmerTable(f"k{k}", k, rows, columns, shared=shared)


def _hash_seed(seed: int, name: str) -> int:
    """Returns a 63-bit seed that depends only on the config and the table's name."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _primes_below(limit: int) -> Iterator[int]:
    """Yields the primes up to `limit`, largest first. Raises ValueError after the last."""
    return (n for n in count(limit, -1) if _is_prime(n))


def _is_prime(n: int) -> bool:
    if n < 2:
        raise ValueError("there are no more primes")
    return all(n % d for d in range(2, int(n**0.5) + 1))


SMALL_K = 6  # the paper's largest; 288 MB at d_m 1024, at 18 bytes a parameter
LARGE_BYTES = 2**30


@dataclass(frozen=True)
class Placement:
    """How a table is split over the ranks.

    Attributes:
        rows_over: the process group that the rows are split over; None if split by columns.
        reason: why, for reports.
    """

    table: KmerTable
    rows_over: Literal["tensor", "expert", "data"] | None
    reason: str

    @property
    def split(self) -> str:
        """The value of `gengram.split` that this corresponds to."""
        return "columns" if self.rows_over is None else "rows"

    def columns_held(self, tensor: int) -> int:
        """Returns the number of columns that each of `tensor` tensor-parallel ranks holds: all of
        them if the rows are split over these ranks."""
        return self.table.columns if self.rows_over == "tensor" else self.table.columns // tensor


def placements(config: Config, world_size: int) -> tuple[Placement, ...]:
    """Returns the placements of all tables of a layer. The config must have passed check_layout."""
    return tuple(_place(table, config, world_size) for table in kmer_tables(config.model.gengram))


def _place(table: KmerTable, config: Config, world_size: int) -> Placement:
    gengram = config.model.gengram
    over = gengram.rows_over or "data"
    ranks = group_sizes(config, world_size)[over]
    if gengram.split == "columns":
        return Placement(table, None, "gengram.split is columns")
    if config.train.engine == "deepspeed":
        return Placement(table, None, "DeepSpeed shards tables like all other weights")
    if gengram.split == "auto" and table.k <= SMALL_K:
        return Placement(table, None, f"k is at most {SMALL_K}")
    if ranks == 1:
        return Placement(table, None, f"there is one {over}-parallel rank")
    if table.rows < ranks:
        return Placement(table, None, f"{table.rows} rows for {ranks} {over}-parallel ranks")
    if gengram.split == "rows":
        return Placement(table, over, "gengram.split is rows")
    size = bytes_by_columns(table, config, world_size)
    gib = f"{size / 2**30:.2f} GiB per rank"
    if size < LARGE_BYTES:
        return Placement(table, None, f"split by columns takes {gib}")
    return Placement(table, over, f"split by columns takes {gib}")


def bytes_by_columns(table: KmerTable, config: Config, world_size: int) -> int:
    """Returns the bytes of weights, float32 gradients and Adam's states per rank if the table is
    split by columns."""
    parameters = table.rows * table.columns // config.parallel.tensor
    bf16 = config.train.dtype == "bf16"
    states = 12 if bf16 else 8  # two moments, and for bf16 the float32 master weights
    copies = group_sizes(config, world_size)["data"] if config.optimizer.distributed else 1
    return parameters * ((2 if bf16 else 4) + 4) + parameters * states // copies


def group_sizes(config: Config, world_size: int) -> dict[str, int]:
    """Returns the sizes of the groups that rows can be split over. Context-parallel ranks belong to
    the data-parallel group here, because both hold copies of the weights."""
    parallel = config.parallel
    return {
        "tensor": parallel.tensor,
        "expert": parallel.expert,
        "data": world_size // (parallel.tensor * parallel.pipeline),
    }
