"""Row ids of k-mers: which row of each table belongs to the k-mer that ends at each token, and how
many rows the tokens of a step look up.

Paper section 3.1: the alphabet is {A, C, G, T, N}, and the row of a k-mer is its number in base 5,
with the last token as the least significant digit. With shared rows, the smaller of the numbers of
a k-mer and its reverse complement is used. Tables of large k hash the number to a row
(config/tables.py lists the tables).
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gengram_megatron.config.tables import ALPHABET_SIZE, KmerTable

COMPLEMENT = (3, 2, 1, 0, 4)  # the complements of the digits of A, C, G, T, N


@dataclass(frozen=True)
class KmerIds:
    """The k-mers of a microbatch of whole sequences, shared by all layers with memory.

    ids[i]: [b, s] int32, the row of tables[i] for the k-mer that ends at each token. A k-mer that
        starts before the sequence or contains a token outside the alphabet (EOD, PAD) is not
        valid; its id is tables[i].rows, one past the last row.
    documents: [b, s] int32, the number of each token's document, or None if memory may look across
        documents. An EOD belongs to the document after it; nothing looks across it.
    """

    ids: tuple[Tensor, ...]
    tables: tuple[KmerTable, ...]
    documents: Tensor | None = None
    plans: list[Any] = field(default_factory=list)
    """For rows that other ranks hold: which rank sends which rows, filled in by tables.py."""

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor,
        tables: tuple[KmerTable, ...],
        token_ids: list[int],
        eod: int | None = None,
    ) -> "KmerIds":
        """Computes the ids of whole sequences.

        tokens: [b, s], any integer dtype. token_ids: the ids of A C G T N, in the order of their
        digits 0 to 4. eod: the id that ends a document, or None if memory may look across
        documents.
        """
        digit = torch.full((256,), -1, dtype=torch.int64, device=tokens.device)
        digit[token_ids] = torch.arange(ALPHABET_SIZE, device=tokens.device)
        digits = digit[tokens.long()]
        numbers = _numbers(digits, max(table.k for table in tables))
        shared = max((table.k for table in tables if table.shared), default=0)
        complements = _reverse_complement_numbers(digits, shared)
        ids = tuple(
            _rows(table, *numbers[table.k], complements[table.k] if table.shared else None).int()
            for table in tables
        )
        documents = None if eod is None else (tokens == eod).cumsum(1, dtype=torch.int32)
        return cls(ids, tables, documents)

    @property
    def seq_length(self) -> int:
        """The sequence length s."""
        return self.ids[0].shape[1]


def _numbers(digits: Tensor, largest: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Returns for each k up to `largest` the number of the k-mer that ends at each token, and
    whether it is valid; each [b, s]. The numbers are exact up to k = 27.

    digits: [b, s] int64, -1 outside the alphabet.
    """
    in_alphabet, known = digits >= 0, digits.clamp(min=0)
    number, valid, numbers = torch.zeros_like(known), torch.ones_like(in_alphabet), {}
    for k in range(1, largest + 1):
        # The k-mer that ends here: the (k-1)-mer that ends one token earlier, then this token.
        before = 0 if k == 1 else 1
        number = _shift(number, before, 0) * ALPHABET_SIZE + known
        valid = _shift(valid, before, False) & in_alphabet
        numbers[k] = number, valid
    return numbers


def _reverse_complement_numbers(digits: Tensor, largest: int) -> dict[int, Tensor]:
    """Returns for each k up to `largest` the number of the reverse complement of the k-mer that
    ends at each token, [b, s] int64."""
    complements = torch.tensor(COMPLEMENT, device=digits.device)[digits.clamp(min=0)]
    number, numbers = torch.zeros_like(digits), {}
    for k in range(1, largest + 1):
        # The reverse complement begins with the complement of this token.
        number = _shift(number, 0 if k == 1 else 1, 0) + complements * ALPHABET_SIZE ** (k - 1)
        numbers[k] = number
    return numbers


def _rows(table: KmerTable, number: Tensor, valid: Tensor, complement: Tensor | None) -> Tensor:
    """Returns the rows of k-mers in a table, [b, s] int64; table.rows for those that are not valid.
    complement: the numbers of the reverse complements, if they share rows with the k-mers."""
    if complement is not None:
        number = torch.minimum(number, complement)
    if table.hash_seed is not None:
        number = hash_numbers(number, table.hash_seed) % table.rows
    elif complement is not None:
        number = _shared_rows(table.k).to(number.device)[number]
    return torch.where(valid, number, table.rows)


def hash_numbers(number: Tensor, seed: int) -> Tensor:
    """Hashes int64 numbers to 63 bits with the finalizer of SplitMix64 (Steele, Lea and Flood,
    2014). It uses only integers, so the result is the same on every device."""
    x = number ^ seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _logical_shift(x, shift)) * (factor - (1 << 64))  # as int64; products wrap around
    return (x ^ _logical_shift(x, 31)) & ((1 << 63) - 1)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """Shifts x right by `bits` bits and fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@cache
def _shared_rows(k: int) -> Tensor:
    """Returns [5^k], the row of each k-mer number that is at most its reverse complement's: how
    many such numbers are smaller. The other entries are not used."""
    digits = torch.arange(ALPHABET_SIZE**k)
    number, backward = digits.clone(), torch.zeros_like(digits)
    for _ in range(k):
        backward = backward * ALPHABET_SIZE + torch.tensor(COMPLEMENT)[number % ALPHABET_SIZE]
        number = number // ALPHABET_SIZE
    return (digits <= backward).cumsum(0) - 1


def _shift(x: Tensor, positions: int, fill: int) -> Tensor:
    """Shifts x [b, s] to the right along the sequence and fills the start with `fill`."""
    if positions == 0:
        return x
    return torch.cat([torch.full_like(x[:, :positions], fill), x[:, :-positions]], dim=1)


class GengramInputs:
    """Computes the k-mers of each microbatch, and counts the table rows that a step looks up.

    Row ids depend only on the tokens, so the count is the same in every layer with memory.

    Args:
        tables: the tables of one layer.
        token_ids: the ids of A C G T N.
        eod: the id that ends a document, or None if memory may look across documents.
    """

    def __init__(self, tables: tuple[KmerTable, ...], token_ids: list[int], eod: int | None):
        self._tables, self._token_ids, self._eod = tables, token_ids, eod
        self._lookup_flags: list[Tensor] = []

    def __call__(self, tokens: Tensor, training: bool) -> KmerIds:
        """Returns the k-mers of tokens [b, s]. Look-ups are counted only if training."""
        kmers = KmerIds.from_tokens(tokens, self._tables, self._token_ids, self._eod)
        if training:
            for flags, ids in zip(self._flags(), kmers.ids):
                flags[ids.flatten()] = 1
        return kmers

    def metrics(self, data_group: dist.ProcessGroup) -> dict[str, float]:
        """Returns rows_touched: the number of rows of all tables that were looked up since the last
        call, on any rank of the group. All ranks of the group must call it."""
        all_flags = torch.cat([flags[:-1] for flags in self._flags()])
        dist.all_reduce(all_flags, op=dist.ReduceOp.MAX, group=data_group)
        for flags in self._flags():
            flags.zero_()
        return {"rows_touched": int(all_flags.sum(dtype=torch.int64))}

    def _flags(self) -> list[Tensor]:
        """Returns for each table [rows + 1] uint8, 1 where a row was looked up. The last element is
        for k-mers that are not valid."""
        if not self._lookup_flags:
            device = torch.cuda.current_device()
            self._lookup_flags = [
                torch.zeros(table.rows + 1, dtype=torch.uint8, device=device)
                for table in self._tables
            ]
        return self._lookup_flags
