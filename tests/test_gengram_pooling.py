"""Pooled features: exact in bf16 at any length, the same in pieces as in one, causal; and the
pieces of a sequence that ranks hold."""

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gengram_megatron.config.tables import direct_table
from gengram_megatron.tokenizer import BASE_IDS, EOD, DnaTokenizer

DNA = Path(__file__).parent.parent / "sample_data/gorilla_chr22_sample.fa.gz"
SIZES = (1, 2, 3, 4, 5, 6)
WINDOW, DIM = 21, 64


@pytest.fixture(scope="module", autouse=True)
def imported():
    """So that no property test counts the import of megatron-core as its own time."""
    import gengram_megatron.engine.model  # noqa: F401


def random_dna(length: int, seed: int = 0, odd: float = 0.01) -> Tensor:
    """Tokens [1, length], some of them N and EOD."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(BASE_IDS)[torch.randint(4, (length,), generator=generator)]
    chance = torch.rand(length, generator=generator)
    tokens[chance < odd] = BASE_IDS[4]
    tokens[chance < odd / 2] = EOD
    return tokens[None]


def real_dna(length: int) -> Tensor:
    with gzip.open(DNA, "rt") as lines:
        text = "".join(line.strip() for line in lines if not line.startswith(">"))[:length]
    return torch.from_numpy(DnaTokenizer().encode(text).astype(np.int64))[None]


def kmer_ids(tokens: Tensor) -> tuple[Tensor, ...]:
    from gengram_megatron.engine.model.gengram.ids import KmerIds

    return KmerIds.from_tokens(tokens, tuple(direct_table(k, 1) for k in SIZES), list(BASE_IDS)).ids


def make_table(k: int, dtype: torch.dtype, dim: int = DIM) -> Tensor:
    values = torch.randn((5**k, dim), generator=torch.Generator().manual_seed(k))
    return values.to(dtype)


def looked_up(table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The row of every k-mer, zero where it is not valid: [s, d]; and whether it is: [s, 1]."""
    valid = (ids[0] < len(table))[:, None]
    return torch.where(valid, table[ids[0].clamp(max=len(table) - 1)], 0), valid


def slow_window_sum(x: Tensor, span: int) -> Tensor:
    total = torch.zeros_like(x)
    for back in range(min(span, len(x))):
        total[back:] += x[: len(x) - back]
    return total


def exact_mean(table: Tensor, ids: Tensor, span: int) -> Tensor:
    """In float64, one addition after the other: [s, d]."""
    rows, valid = looked_up(table.double(), ids)
    return slow_window_sum(rows, span) / slow_window_sum(valid.double(), span).clamp(min=1)


def mean_by_prefix_sums(table: Tensor, ids: Tensor, span: int) -> Tensor:
    """A difference of prefix sums in the table's dtype, as the published code has it: [s, d]."""
    rows, valid = looked_up(table, ids)

    def window_sum(x: Tensor) -> Tensor:
        prefix = x.cumsum(0)
        return torch.cat([prefix[:span], prefix[span:] - prefix[:-span]])

    return window_sum(rows) / window_sum(valid.float()).clamp(min=1).to(rows.dtype)


def error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("length", [8_192, 32_768])
@pytest.mark.parametrize("source", [random_dna, real_dna], ids=["random", "real"])
def test_pooled_features_in_bf16_are_as_good_as_rounding(source, length):
    from gengram_megatron.engine.model.gengram.pooling import Pooling, window_mean
    from gengram_megatron.engine.model.sequence import TokenRange

    ids_of_k, ours, prefix, exact = kmer_ids(source(length)), [], [], []
    for k, ids in zip(SIZES, ids_of_k):
        table, span = make_table(k, torch.bfloat16), WINDOW - k + 1
        ours.append(window_mean(table, ids, k, Pooling(WINDOW), [TokenRange(0, length)])[:, 0])
        prefix.append(mean_by_prefix_sums(table, ids, span))
        exact.append(exact_mean(table, ids, span))
        assert ours[-1].dtype == torch.bfloat16
    for place in (slice(None), slice(-256, None)):
        a, b, truth = (torch.cat([x[place] for x in xs], -1) for xs in (ours, prefix, exact))
        rounding = error(truth.bfloat16(), truth)
        assert error(a, truth) <= 2 * rounding
        assert error(b, truth) > 50 * rounding  # the way that this test is there to tell apart


@pytest.mark.parametrize("length", [8_192, 32_768])
@pytest.mark.parametrize("k", [1, 6])
def test_gradients_of_tables_in_bf16_are_as_good_as_rounding(k, length):
    from gengram_megatron.engine.model.gengram.pooling import Pooling, window_mean
    from gengram_megatron.engine.model.sequence import TokenRange

    ids = kmer_ids(random_dna(length))[k - 1]
    table = make_table(k, torch.bfloat16).requires_grad_()
    exact = table.detach().double().requires_grad_()
    weight = torch.randn((length, DIM), generator=torch.Generator().manual_seed(9)).bfloat16()
    window_mean(table, ids, k, Pooling(WINDOW), [TokenRange(0, length)])[:, 0].backward(weight)
    exact_mean(exact, ids, WINDOW - k + 1).backward(weight.double())
    assert error(table.grad, exact.grad) <= 2 * error(exact.grad.bfloat16(), exact.grad)


@given(span=st.integers(1, 40), length=st.integers(1, 50))
@settings(deadline=None, max_examples=400)
def test_sliding_sum(span, length):
    from gengram_megatron.engine.model.gengram.pooling import sliding_sum

    x = torch.randint(-1000, 1000, (length, 2, 3), generator=torch.Generator().manual_seed(length))
    before = x.clone()
    expected = torch.stack([x[max(t - span + 1, 0) : t + 1].sum(0) for t in range(length)])
    assert torch.equal(sliding_sum(x, span), expected)
    assert torch.equal(x, before)


def mean_and_gradient(table: Tensor, ids: Tensor, k: int, window, pieces, weight: Tensor):
    from gengram_megatron.engine.model.gengram.pooling import Pooling, window_mean

    table = table.detach().requires_grad_()
    out = window_mean(table, ids, k, Pooling(window), pieces)
    out.backward(weight)
    return out.detach(), table.grad


@st.composite
def cuts(draw) -> tuple[int, list[list]]:
    """A length, and the pieces of each rank: as context and sequence parallelism cut, or at any
    places at all."""
    from gengram_megatron.engine.model.sequence import TokenRange, context_ranges, sequence_ranges

    if draw(st.booleans()):
        length = draw(st.integers(1, 90))
        places = sorted(draw(st.sets(st.integers(1, length), max_size=6)) | {0, length})
        pieces = [TokenRange(a, b) for a, b in pairwise(places)]
        return length, [[piece] for piece in draw(st.permutations(pieces))]
    cp, tp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    length = 2 * cp * tp * draw(st.integers(1, 8))
    return length, [
        sequence_ranges(context_ranges(length, cp, i), tp, j) for i in range(cp) for j in range(tp)
    ]


@given(cut=cuts(), k=st.sampled_from([1, 3, 6]), window=st.sampled_from([None, 6, 21, 30]))
@settings(deadline=None, max_examples=150)
def test_pieces_together_are_the_whole(cut, k, window):
    """Forward, and the gradients of the table summed over the ranks."""
    from gengram_megatron.engine.model.sequence import TokenRange, select_ranges

    length, ranks = cut
    tokens = torch.cat([random_dna(length, seed, odd=0.2) for seed in (1, 2)])
    ids, table = kmer_ids(tokens)[k - 1], make_table(k, torch.float64, dim=3)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn((length, 2, 3), generator=generator, dtype=torch.float64)
    whole, gradient = mean_and_gradient(table, ids, k, window, [TokenRange(0, length)], weight)
    total = torch.zeros_like(table)
    for pieces in ranks:
        part, own = mean_and_gradient(
            table, ids, k, window, pieces, select_ranges(weight, pieces, 0)
        )
        torch.testing.assert_close(part, select_ranges(whole, pieces, 0), rtol=1e-12, atol=1e-12)
        total += own
    torch.testing.assert_close(total, gradient, rtol=1e-12, atol=1e-12)


@given(place=st.integers(0, 99), k=st.sampled_from(SIZES), window=st.sampled_from([None, 6, 21]))
@settings(deadline=None, max_examples=60)
def test_a_token_changes_the_features_of_the_window_that_it_starts_and_no_others(place, k, window):
    """So the feature at p depends on tokens p - W + 1 to p only."""
    from gengram_megatron.engine.model.gengram.pooling import Pooling, window_mean
    from gengram_megatron.engine.model.sequence import TokenRange

    tokens, table = random_dna(100, odd=0), make_table(k, torch.float64, dim=3)
    changed = tokens.clone()
    changed[0, place] = BASE_IDS[4]
    before, after = (
        window_mean(table, kmer_ids(t)[k - 1], k, Pooling(window), [TokenRange(0, 100)])
        for t in (tokens, changed)
    )
    differs = before.ne(after).flatten(1).any(1).nonzero().flatten().tolist()
    # The first k-mer of a sequence ends at its token k; before that there is nothing to change.
    assert differs == list(range(max(place, k - 1), min(place + (window or k), 100)))


@given(cut=cuts())
@settings(deadline=None, max_examples=100)
def test_the_pieces_of_all_ranks_are_the_sequence_each_token_once(cut):
    from gengram_megatron.engine.model.sequence import select_ranges

    length, ranks = cut
    held = [select_ranges(torch.arange(length), pieces, 0) for pieces in ranks]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    for pieces, positions in zip(ranks, held):
        assert sum(map(len, pieces)) == len(positions)
        assert all(0 <= piece.start < piece.stop <= length for piece in pieces)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_zigzag_is_what_megatron_holds_and_can_be_undone(cp):
    """Rank r holds chunks r and 2 cp - 1 - r; gathered in the ranks' order they come back."""
    from gengram_megatron.engine.model.sequence import (
        chunks_in_sequence_order,
        context_ranges,
        select_ranges,
    )

    sequence = torch.randn(12 * cp, 2, generator=torch.Generator().manual_seed(cp))
    held = [select_ranges(sequence, context_ranges(12 * cp, cp, rank), 0) for rank in range(cp)]
    chunks = sequence.chunk(2 * cp)
    for rank, own in enumerate(held):
        assert torch.equal(own, torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]]))
    assert torch.equal(chunks_in_sequence_order(torch.cat(held), cp), sequence)


@pytest.mark.parametrize("dim", [0, 1])
def test_take_along_either_axis(dim):
    from gengram_megatron.engine.model.sequence import TokenRange, select_ranges

    grid = torch.arange(100).view(10, 10)
    taken = select_ranges(grid, [TokenRange(7, 9), TokenRange(1, 2)], dim)
    assert torch.equal(taken, grid[[7, 8, 1]] if dim == 0 else grid[:, [7, 8, 1]])
