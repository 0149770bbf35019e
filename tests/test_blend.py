"""Blends: exact shares, each set once through before it begins again, whatever the layout."""

import pickle
import tracemalloc
from collections import Counter
from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram_megatron.engine.data.samples import BLOCK, GOLDEN_RATIO, BlendOrder, SampleOrder

SET_TWO = 25_066_252  # samples of the paper's 200 B token run
SHARES = [Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]

GOLDEN_START = [15305672, 23402144, 25067256, 15061387, 25067254, 7930105, 25067245, 8529624]
weights = st.lists(
    st.fractions(min_value=Fraction(1, 1000), max_value=1000), min_size=1, max_size=6
)


def sets_of(order: BlendOrder, sizes: list[int], positions: np.ndarray) -> np.ndarray:
    """Which set has the sample at each position."""
    return np.searchsorted(np.cumsum(sizes), order.samples_at(positions), side="right")


@given(weights, st.lists(st.integers(1, 40), min_size=6, max_size=6), st.integers(0, 2**70))
@settings(deadline=None, max_examples=30)
def test_each_set_is_read_in_its_own_order_from_its_first_sample_on(shares, sizes, seed):
    """The slow version: walk from the start and count how many samples each set has had."""
    sizes = sizes[: len(shares)]
    order = BlendOrder(sizes, shares, seed)
    own = [SampleOrder(size, seed + i * int(GOLDEN_RATIO)) for i, size in enumerate(sizes)]
    had = [0] * len(sizes)
    for sample in order.samples_at(np.arange(300)).tolist():
        number = 0
        while sample >= sizes[number]:
            sample -= sizes[number]
            number += 1
        assert sample == own[number][had[number]]
        had[number] += 1
    assert order.counts(300) == had


@given(weights, st.integers(0, 2**70), st.integers(0, 10**15))
@settings(deadline=None, max_examples=60)
def test_shares_hold_everywhere(shares, seed, start):
    """Also far into a run, and for shares such as 1 / 997 000."""
    order, levels = BlendOrder([10**9] * len(shares), shares, seed), ceil(log2(len(shares)))
    for total in range(start, start + 40):
        counts = order.counts(total)
        assert sum(counts) == total
        for count, share in zip(counts, shares):
            assert abs(count - total * share / sum(shares)) <= levels * (BLOCK / 4 + 1)


def test_shares_are_exact_where_they_can_be():
    for seed in range(20):
        order = BlendOrder([100] * 3, SHARES, seed)
        for blocks in (1, 7, 12345):
            total = 16 * 10 * blocks
            assert order.counts(total) == [share * total for share in SHARES]


@given(weights, st.integers(0, 10**12), st.integers(1, 80))
@settings(deadline=None, max_examples=30)
def test_a_sample_does_not_depend_on_what_it_is_asked_with(shares, start, count):
    order = BlendOrder([1000] * len(shares), shares, 3)
    positions = np.arange(start, start + count)
    taken = order.samples_at(positions)
    assert taken.tolist() == [int(order.samples_at(np.array(position))) for position in positions]
    assert np.array_equal(order.samples_at(positions[::-1].reshape(-1, 1))[:, 0], taken[::-1])


def test_a_blend_of_one_set_is_that_set():
    positions = np.arange(500)
    alone = SampleOrder(77, 1234).samples_at(positions)
    assert np.array_equal(BlendOrder([77], [Fraction(3)], 1234).samples_at(positions), alone)


def test_only_the_ratio_of_weights_counts():
    positions = np.arange(1000)
    one, other = (
        BlendOrder([50, 60, 70], [factor * share for share in SHARES], 9).samples_at(positions)
        for factor in (1, Fraction(10, 3))
    )
    assert np.array_equal(one, other)


def test_seeds_differ_in_the_places_of_a_set_and_in_its_samples():
    positions, sizes = np.arange(2000), [5000, 5000]
    orders = [BlendOrder(sizes, [Fraction(1)] * 2, seed) for seed in (1, 2)]
    sets = [sets_of(order, sizes, positions) for order in orders]
    assert 800 < (sets[0] == sets[1]).sum() < 1200
    assert (orders[0].samples_at(positions) == orders[1].samples_at(positions)).sum() < 10


def test_sets_of_one_size_have_orders_of_their_own():
    samples = BlendOrder([1000, 1000], [Fraction(1)] * 2, 5).samples_at(np.arange(2000))
    first, second = samples[samples < 1000], samples[samples >= 1000] - 1000
    assert len(first) == len(second) == 1000 and (first == second).sum() < 10


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_no_rank_reads_one_set_only(ranks):
    """Rows are dealt to ranks in turn, so a rank has every n-th position."""
    sizes = [10**6, 10**6]
    order = BlendOrder(sizes, [Fraction(1)] * 2, 4)
    for rank in range(ranks):
        counts = Counter(sets_of(order, sizes, np.arange(rank, 4000 * ranks, ranks)).tolist())
        assert abs(counts[0] - 2000) < 250  # eight standard deviations of a fair coin


def test_golden_values():
    """A change here is a change of every blend's order: old runs could not be resumed."""
    order = BlendOrder([SET_TWO, 1000, 10], SHARES, 1234)
    assert order.samples_at(np.arange(8)).tolist() == GOLDEN_START


def test_a_blend_of_seventy_five_million_samples_costs_nothing_to_hold():
    positions = np.arange(10**9, 10**9 + 1024)
    tracemalloc.start()
    order = BlendOrder([SET_TWO] * 3, SHARES, 1234)
    held = tracemalloc.get_traced_memory()[0]
    order.samples_at(positions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 10_000 and len(pickle.dumps(order)) < 10_000
    assert peak < 1_000_000
