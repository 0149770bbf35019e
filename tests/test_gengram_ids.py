"""Which row each k-mer has: direct, hashed and shared tables against counting by hand."""

import pytest
import torch

from gengram_megatron.config.schema import Gengram
from gengram_megatron.config.tables import direct_table, kmer_tables
from gengram_megatron.tokenizer import BASE_IDS, EOD

COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
LETTERS = "ACGTN"


def text(length: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return "".join(LETTERS[i] for i in torch.randint(5, (length,), generator=generator))


def rows(sequence: str, tables) -> list[list[int]]:
    """A list for each table: the row of the k-mer that ends at each letter; "." is an EOD."""
    from gengram_megatron.engine.model.gengram.ids import KmerIds

    ids = [EOD if letter == "." else BASE_IDS[LETTERS.index(letter)] for letter in sequence]
    return [
        x[0].tolist() for x in KmerIds.from_tokens(torch.tensor([ids]), tables, list(BASE_IDS)).ids
    ]


def reverse_complement(sequence: str) -> str:
    return "".join(COMPLEMENT[letter] for letter in reversed(sequence))


def number(kmer: str) -> int:
    return int("".join(str(LETTERS.index(letter)) for letter in kmer), 5)


def splitmix(x: int) -> int:
    """SplitMix64's finalizer on Python's own integers, which do not wrap."""
    mask = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) & (2**63 - 1)


@pytest.mark.parametrize("k", [1, 2, 6, 7, 8])
def test_direct_rows_are_base_5_numbers(k: int) -> None:
    sequence = text(40) + "." + text(40, 1)
    (found,) = rows(sequence, (direct_table(k, 1),))
    for end, row in enumerate(found):
        kmer = sequence[max(end - k + 1, 0) : end + 1]
        whole = len(kmer) == k and "." not in kmer
        assert row == (number(kmer) if whole else 5**k)


@pytest.mark.parametrize("k", range(1, 9))
def test_shared_rows_are_as_many_as_pairs_and_none_is_unused(k: int) -> None:
    """Every k-mer of k up to 4, many of the others; the pairs counted one by one."""
    table = direct_table(k, 1, shared=True)
    if k <= 4:
        kmers = [""]
        for _ in range(k):
            kmers = [kmer + letter for kmer in kmers for letter in LETTERS]
        pairs = {min(kmer, reverse_complement(kmer), key=number) for kmer in kmers}
        assert table.rows == len(pairs)
        found = {rows(kmer, (table,))[0][-1] for kmer in kmers}
        assert found == set(range(table.rows))
    sequence = text(2000, k)
    (found,) = rows(sequence, (table,))
    by_pair = {}
    for end in range(k - 1, len(sequence)):
        kmer = sequence[end - k + 1 : end + 1]
        by_pair.setdefault(min(kmer, reverse_complement(kmer)), set()).add(found[end])
    assert all(len(own) == 1 and 0 <= min(own) < table.rows for own in by_pair.values())
    assert len(set.union(*by_pair.values())) == len(by_pair)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k", [9, 12, 27])
def test_hashed_rows(k: int, shared: bool) -> None:
    settings = Gengram(
        kmer_sizes=[k], hashing={"rows": 1000, "heads": 3}, share_reverse_complements=shared
    )
    tables = kmer_tables(settings)
    assert [table.rows for table in tables] == [997, 991, 983]  # primes
    assert len({table.hash_seed for table in tables}) == 3
    sequence = text(60) + "." + text(60, 1)
    for table, found in zip(tables, rows(sequence, tables)):
        for end, row in enumerate(found):
            kmer = sequence[max(end - k + 1, 0) : end + 1]
            if len(kmer) < k or "." in kmer:
                assert row == table.rows
                continue
            own = number(kmer)
            if shared:
                own = min(own, number(reverse_complement(kmer)))
            assert row == splitmix(own ^ table.hash_seed) % table.rows


def test_hash_never_changes() -> None:
    """What checkpoints rely on: these numbers were written down once."""
    tables = kmer_tables(Gengram(kmer_sizes=[12], hashing={"rows": 2**24, "heads": 2}))
    assert [table.rows for table in tables] == [16777213, 16777199]
    found = rows("ACGTACGTNACGTTTGACCA", tables)
    assert [own[-1] for own in found] == [13377167, 16437893]


def test_hash_spreads() -> None:
    """Distinct 12-mers of real length fill a table as balls thrown at random would."""
    (table,) = kmer_tables(Gengram(kmer_sizes=[12], hashing={"rows": 4096, "heads": 1}))
    sequence = text(4096 + 11, seed=2)
    (found,) = rows(sequence, (table,))
    used = len(set(found[11:])) / table.rows
    assert used == pytest.approx(1 - 2.718281828 ** (-4096 / table.rows), abs=0.03)


def test_both_strands_read_the_same_rows() -> None:
    settings = Gengram(kmer_sizes=[1, 2, 5, 8, 11], share_reverse_complements=True)
    tables, sequence = kmer_tables(settings), text(200, seed=3)
    for table, one, other in zip(
        tables, rows(sequence, tables), rows(reverse_complement(sequence), tables)
    ):
        assert one[table.k - 1 :] == other[table.k - 1 :][::-1]
