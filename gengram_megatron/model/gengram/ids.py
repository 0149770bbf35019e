"""Row numbers of k-mers: which row of table k belongs to the k-mer that ends at each token.

Paper section 3.1: the alphabet is {A, C, G, T, N}, table k has 5^k rows, and the row of a k-mer is
its number in base 5, the last token being the least significant digit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALPHABET_SIZE = 5


def rows_of(k: int) -> int:
    """Rows of the table of k-mers."""
    return ALPHABET_SIZE**k


@dataclass(frozen=True)
class KmerIds:
    """The k-mers of a microbatch of whole sequences, shared by all layers with memory.

    ids[i]: [b, s] int32, the row of table kmer_sizes[i] for the k-mer that ends at each token.
    A k-mer that reaches before the sequence or holds a token outside the alphabet (EOD, PAD) is
    not valid; its id is 5^k, one past the last row.
    documents: [b, s] int32, the number of each token's document, or None where memory may look
    across documents. An EOD counts to the document that it precedes: nothing crosses it.
    """

    ids: tuple[Tensor, ...]
    kmer_sizes: tuple[int, ...]
    documents: Tensor | None = None

    @classmethod
    def of(
        cls,
        tokens: Tensor,
        kmer_sizes: tuple[int, ...],
        token_ids: list[int],
        eod: int | None = None,
    ) -> "KmerIds":
        """tokens: [b, s], any integer dtype; token_ids: the ids of A C G T N, digits 0 to 4;
        eod: the id that ends a document, where memory must stop there."""
        digit = torch.full((256,), -1, dtype=torch.int32, device=tokens.device)
        digit[token_ids] = torch.arange(ALPHABET_SIZE, dtype=torch.int32, device=tokens.device)
        digits = digit[tokens.long()]

        row, valid, rows = torch.zeros_like(digits), torch.ones_like(digits, dtype=torch.bool), {}
        for k in range(1, max(kmer_sizes) + 1):
            # The k-mer that ends here: the (k-1)-mer that ends one token earlier, then this token.
            before = 0 if k == 1 else 1
            row = _shift(row, before, 0) * ALPHABET_SIZE + digits
            valid = _shift(valid, before, False) & (digits >= 0)
            rows[k] = torch.where(valid, row, rows_of(k))
        documents = None if eod is None else (tokens == eod).cumsum(1, dtype=torch.int32)
        return cls(tuple(rows[k] for k in kmer_sizes), kmer_sizes, documents)


def _shift(x: Tensor, places: int, fill) -> Tensor:
    """x moved to the right along the sequence, its start filled."""
    if places == 0:
        return x
    return torch.cat([torch.full_like(x[:, :places], fill), x[:, :-places]], dim=1)


def table_rows(kmer_sizes: tuple[int, ...]) -> int:
    """Rows of all tables together: 19,530 for k = 1..6."""
    return sum(map(rows_of, kmer_sizes))
