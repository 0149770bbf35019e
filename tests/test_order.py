"""The order of samples: once an epoch, mixed well, decided by the seed, never changed unnoticed."""

import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gengram_megatron.engine.data.samples import SampleOrder

SET_TWO = 25_066_252  # samples of the paper's 200 B token run

GOLDEN_TEN = [0, 4, 2, 8, 6, 7, 9, 1, 3, 5, 7, 9, 6, 8, 0, 1, 2, 4, 5, 3]
GOLDEN_START = [15305672, 23402144, 15061387, 7930105, 8529624, 7099299]
GOLDEN_LATER = [23300688, 20106862, 3512447, 15658696, 21366122, 21478915]


def epoch(num_samples: int, seed: int = 1, number: int = 0) -> np.ndarray:
    start = number * num_samples
    return SampleOrder(num_samples, seed).samples_at(np.arange(start, start + num_samples))


def chi_square_score(counts: np.ndarray) -> float:
    """How many standard deviations the counts lie from a uniform draw, about N(0, 1)."""
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 10**6))
@settings(deadline=None)
def test_every_epoch_holds_every_sample_once(num_samples, seed, number):
    assert np.array_equal(np.sort(epoch(num_samples, seed, number)), np.arange(num_samples))


def test_every_small_and_a_large_size_are_bijections():
    for num_samples in [*range(1, 300), 1_000_003]:
        assert np.array_equal(np.sort(epoch(num_samples)), np.arange(num_samples))


@given(st.integers(1, 10**12), st.integers(0, 2**40), st.integers(1, 64))
@settings(deadline=None)
def test_take_agrees_with_getitem_and_does_not_depend_on_the_batch(num_samples, start, count):
    order = SampleOrder(num_samples, seed=3)
    positions = np.arange(start, start + count)
    taken = order.samples_at(positions)
    assert taken.tolist() == [order[int(position)] for position in positions]
    assert np.array_equal(order.samples_at(positions[::-1]), taken[::-1])


def test_golden_values():
    """A change here is a change of every run's order: old runs could not be resumed."""
    assert SampleOrder(10, 0).samples_at(np.arange(20)).tolist() == GOLDEN_TEN
    assert SampleOrder(SET_TWO, 1234).samples_at(np.arange(6)).tolist() == GOLDEN_START
    assert (
        SampleOrder(SET_TWO, 1234).samples_at(3 * SET_TWO + np.arange(6)).tolist() == GOLDEN_LATER
    )


@pytest.mark.parametrize("other", [{"seed": 2}, {"number": 1}, {"seed": 2**32 + 1}])
def test_seeds_and_epochs_differ(other):
    """Two independent permutations of n agree in about one place, whatever n is."""
    assert (epoch(10_000) == epoch(10_000, **other)).sum() < 10


def test_no_seed_is_another_seed_at_a_later_epoch():
    firsts = {tuple(epoch(50, seed, number)) for seed in range(40) for number in range(40)}
    assert len(firsts) == 1600


def test_all_permutations_of_few_samples_come_about_equally_often():
    order, draws = SampleOrder(4, 9), 24_000
    numbers = {permutation: i for i, permutation in enumerate(permutations(range(4)))}
    epochs = order.samples_at(np.arange(4 * draws)).reshape(draws, 4)
    counts = np.bincount([numbers[tuple(row)] for row in epochs.tolist()], minlength=24)
    assert abs(chi_square_score(counts)) < 5


def test_samples_are_uniform_over_positions_and_neighbours_are_independent():
    num_samples, cells = 200_000, 32
    for seed in range(5):
        coarse = epoch(num_samples, seed) * cells // num_samples
        where = np.arange(num_samples) * cells // num_samples
        # A permutation fills each row and column exactly, so the score may lie below zero.
        assert chi_square_score(np.bincount(where * cells + coarse)) < 5
        for distance in (1, 2, 8, 447, 448):  # 448: about a row of the grid
            pairs = coarse[:-distance] * cells + coarse[distance:]
            assert chi_square_score(np.bincount(pairs, minlength=cells**2)) < 5


def test_steps_between_neighbours_do_not_repeat():
    steps = np.diff(epoch(100_000)) % 100_000
    assert np.bincount(steps).max() < 12


def test_twenty_five_million_samples_cost_nothing_to_hold():
    positions = np.arange(10**9, 10**9 + 1024)
    tracemalloc.start()
    SampleOrder(SET_TWO, 1234).samples_at(positions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_an_empty_data_set_has_no_order():
    with pytest.raises(ValueError, match="at least one sample"):
        SampleOrder(0, 1)
