"""The memory tables that a config asks for, and how each is split over the ranks.

Up to k = 8 a table is direct: a row for each of the 5^k k-mers, and no collisions. Above that a
k-mer's row is found by hashing, in the manner of DeepSeek's Engram (arXiv 2601.07372): several
tables a k, its heads, each with a share of the columns, a prime number of rows of its own and a
hash of its own, so that two k-mers that meet in one head hardly meet in another.

Tables split by columns: a tensor-parallel rank holds d / tensor columns of every row; nothing is
communicated to look a row up, but each rank of a data-parallel group has a copy. By rows: a rank
holds a range of rows, and rows are fetched from the ranks that hold them; over the data- or
expert-parallel group, no rank holds a whole table, its gradient or its optimizer states.
"""

import hashlib
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


SMALL_K = 6  # the paper's largest; 288 MB at d_m 1024, at 18 bytes a parameter
LARGE_BYTES = 2**30


@dataclass(frozen=True)
class Placement:
    """over: the group whose ranks share the rows; None: split by columns."""

    table: KmerTable
    over: Literal["tensor", "expert", "data"] | None
    reason: str

    @property
    def split(self) -> str:
        """As the config's key has it."""
        return "columns" if self.over is None else "rows"

    def columns_held(self, tensor: int) -> int:
        """Columns that each of so many tensor-parallel ranks holds: all where they share rows."""
        return self.table.columns if self.over == "tensor" else self.table.columns // tensor


def placements(config: Config, world_size: int) -> tuple[Placement, ...]:
    """Of all tables of a layer. The config is one that check_layout accepts."""
    return tuple(_place(table, config, world_size) for table in kmer_tables(config.model.gengram))


def _place(table: KmerTable, config: Config, world_size: int) -> Placement:
    gengram = config.model.gengram
    over = gengram.rows_over or "data"
    ranks = group_sizes(config, world_size)[over]
    if gengram.split == "columns":
        return Placement(table, None, "gengram.split is columns")
    if config.train.engine == "deepspeed":
        return Placement(table, None, "DeepSpeed shares tables as it does all weights")
    if gengram.split == "auto" and table.k <= SMALL_K:
        return Placement(table, None, f"k is at most {SMALL_K}")
    if ranks == 1:
        return Placement(table, None, f"there is one {over}-parallel rank")
    if table.rows < ranks:
        return Placement(table, None, f"{table.rows} rows for {ranks} {over}-parallel ranks")
    if gengram.split == "rows":
        return Placement(table, over, "gengram.split is rows")
    size = bytes_by_columns(table, config, world_size)
    gib = f"{size / 2**30:.2f} GiB a rank"
    if size < LARGE_BYTES:
        return Placement(table, None, f"by columns {gib}")
    return Placement(table, over, f"by columns {gib}")


def bytes_by_columns(table: KmerTable, config: Config, world_size: int) -> int:
    """Weights, float32 gradients and Adam's states of a rank, were the table split by columns."""
    parameters = table.rows * table.columns // config.parallel.tensor
    bf16 = config.train.dtype == "bf16"
    states = 12 if bf16 else 8  # two moments, and the float32 weights of bf16 ones
    copies = group_sizes(config, world_size)["data"] if config.optimizer.distributed else 1
    return parameters * ((2 if bf16 else 4) + 4) + parameters * states // copies


def group_sizes(config: Config, world_size: int) -> dict[str, int]:
    """Ranks that rows can be shared by. Context-parallel ranks count as data-parallel ones: both
    hold copies of the weights."""
    parallel = config.parallel
    return {
        "tensor": parallel.tensor,
        "expert": parallel.expert,
        "data": world_size // (parallel.tensor * parallel.pipeline),
    }
