"""Row numbers of k-mers: which row of each table belongs to the k-mer that ends at each token, and
how many rows the tokens of a step look up.

Paper section 3.1: the alphabet is {A, C, G, T, N}, and the row of a k-mer is its number in base 5,
the last token being the least significant digit. Tables of large k hash that number to a row, and
with shared rows it is the smaller of the k-mer's number and its reverse complement's
(config/tables.py says which tables there are).
"""

from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from gengram_megatron.config.tables import ALPHABET_SIZE, KmerTable

COMPLEMENT = (3, 2, 1, 0, 4)  # of the digits of A, C, G, T, N


@dataclass(frozen=True)
class KmerIds:
    """The k-mers of a microbatch of whole sequences, shared by all layers with memory.

    ids[i]: [b, s] int32, the row of tables[i] for the k-mer that ends at each token. A k-mer that
    reaches before the sequence or holds a token outside the alphabet (EOD, PAD) is not valid; its
    id is tables[i].rows, one past the last row.
    documents: [b, s] int32, the number of each token's document, or None where memory may look
    across documents. An EOD counts to the document that it precedes: nothing crosses it.
    """

    ids: tuple[Tensor, ...]
    tables: tuple[KmerTable, ...]
    documents: Tensor | None = None
    plans: list = field(default_factory=list)
    """Where rows lie on other ranks: who sends which (tables.py), once it is settled."""

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        tables: tuple[KmerTable, ...],
        token_ids: list[int],
        eod: int | None = None,
    ) -> "KmerIds":
        """tokens: [b, s], any integer dtype; token_ids: the ids of A C G T N, digits 0 to 4;
        eod: the id that ends a document, where memory must stop there."""
        digit = torch.full((256,), -1, dtype=torch.int64, device=tokens.device)
        digit[token_ids] = torch.arange(ALPHABET_SIZE, device=tokens.device)
        digits = digit[tokens.long()]
        numbers = _numbers(digits, max(table.k for table in tables))
        shared = max((table.k for table in tables if table.shared), default=0)
        others = _numbers_of_complements(digits, shared)
        ids = tuple(
            _rows(table, *numbers[table.k], others[table.k] if table.shared else None).int()
            for table in tables
        )
        documents = None if eod is None else (tokens == eod).cumsum(1, dtype=torch.int32)
        return cls(ids, tables, documents)

    @property
    def seq_length(self) -> int:
        """s."""
        return self.ids[0].shape[1]


def _numbers(digits: Tensor, largest: int) -> dict[int, tuple[Tensor, Tensor]]:
    """k -> for the k-mer that ends at each token: its number, and whether it is valid. digits:
    [b, s] int64, -1 outside the alphabet. Exact up to k = 27."""
    inside, known = digits >= 0, digits.clamp(min=0)
    number, valid, found = torch.zeros_like(known), torch.ones_like(inside), {}
    for k in range(1, largest + 1):
        # The k-mer that ends here: the (k-1)-mer that ends one token earlier, then this token.
        before = 0 if k == 1 else 1
        number = _shift(number, before, 0) * ALPHABET_SIZE + known
        valid = _shift(valid, before, False) & inside
        found[k] = number, valid
    return found


def _numbers_of_complements(digits: Tensor, largest: int) -> dict[int, Tensor]:
    """k -> the number of the reverse complement of the k-mer that ends at each token."""
    complements = torch.tensor(COMPLEMENT, device=digits.device)[digits.clamp(min=0)]
    number, found = torch.zeros_like(digits), {}
    for k in range(1, largest + 1):
        # It begins with this token's complement.
        number = _shift(number, 0 if k == 1 else 1, 0) + complements * ALPHABET_SIZE ** (k - 1)
        found[k] = number
    return found


def _rows(table: KmerTable, number: Tensor, valid: Tensor, other: Tensor | None) -> Tensor:
    """[b, s] int64: rows of a table; not valid: table.rows. other: the reverse complements'
    numbers, where they share rows."""
    if other is not None:
        number = torch.minimum(number, other)
    if table.hash_seed is not None:
        number = mixed(number, table.hash_seed) % table.rows
    elif other is not None:
        number = _rows_of_pairs(table.k).to(number.device)[number]
    return torch.where(valid, number, table.rows)


def mixed(number: Tensor, seed: int) -> Tensor:
    """63 bits in which the bits of an int64 are well mixed: the finalizer of SplitMix64 (Steele,
    Lea and Flood, 2014). Integers alone, so the same on every device."""
    x = number ^ seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _logical_shift(x, shift)) * (factor - (1 << 64))  # as int64, whose product wraps
    return (x ^ _logical_shift(x, 31)) & ((1 << 63) - 1)


def _logical_shift(x: Tensor, places: int) -> Tensor:
    """x >> places, filled with zeros."""
    return (x >> places) & ((1 << (64 - places)) - 1)


@cache
def _rows_of_pairs(k: int) -> Tensor:
    """[5^k]: for a number that is the smaller of its pair, how many such numbers come before it."""
    digits = torch.arange(ALPHABET_SIZE**k)
    number, backward = digits.clone(), torch.zeros_like(digits)
    for _ in range(k):
        backward = backward * ALPHABET_SIZE + torch.tensor(COMPLEMENT)[number % ALPHABET_SIZE]
        number = number // ALPHABET_SIZE
    return (digits <= backward).cumsum(0) - 1


def _shift(x: Tensor, places: int, fill) -> Tensor:
    """x moved to the right along the sequence, its start filled."""
    if places == 0:
        return x
    return torch.cat([torch.full_like(x[:, :places], fill), x[:, :-places]], dim=1)


class GengramInputs:
    """Makes the k-mers of each microbatch, and counts the table rows that a step looks up.

    Row numbers depend on the tokens alone, so the count is the same in every layer with memory.

    Args:
        tables: of a layer.
        token_ids: the ids of A C G T N.
        eod: the id that ends a document, where memory must stop there.
    """

    def __init__(self, tables: tuple[KmerTable, ...], token_ids: list[int], eod: int | None):
        self._tables, self._token_ids, self._eod = tables, token_ids, eod
        self._touched: list[Tensor] = []

    def __call__(self, tokens: Tensor, training: bool) -> KmerIds:
        """tokens: [b, s]. What a model that is trained looks up is counted."""
        kmers = KmerIds.of(tokens, self._tables, self._token_ids, self._eod)
        if training:
            for marks, ids in zip(self._marks(), kmers.ids):
                marks[ids.flatten()] = 1
        return kmers

    def metrics(self, data_group: dist.ProcessGroup) -> dict[str, float]:
        """rows_touched: the rows of all tables that were looked up since the last call, on any
        rank of the group. Called by all of its ranks."""
        together = torch.cat([marks[:-1] for marks in self._marks()])
        dist.all_reduce(together, op=dist.ReduceOp.MAX, group=data_group)
        for marks in self._marks():
            marks.zero_()
        return {"rows_touched": int(together.sum(dtype=torch.int64))}

    def _marks(self) -> list[Tensor]:
        """For each table [rows + 1] uint8, 1 where a row was looked up; k-mers that are not valid
        have the id one past the last row."""
        if not self._touched:
            device = torch.cuda.current_device()
            self._touched = [
                torch.zeros(table.rows + 1, dtype=torch.uint8, device=device)
                for table in self._tables
            ]
        return self._touched
