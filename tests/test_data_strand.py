"""Strands: a share that is met, draws that hang on the place alone, and complements by hand."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.write import draw_reversed, reverse_complement
from gengram_megatron.tokenizer import DnaTokenizer


@settings(deadline=None)  # the machine may be busy
@given(st.integers(1, 9), st.data())
def test_turning_against_a_table_of_pairs(length, data):
    texts = data.draw(st.lists(st.text("ACGTN", min_size=length, max_size=length), min_size=1))
    reverse = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    ids = np.stack([DnaTokenizer().encode(text) for text in texts])
    before = ids.copy()
    pairs = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
    for text, ids_of_turned, is_turned in zip(
        texts, reverse_complement(ids, np.array(reverse)), reverse
    ):
        expected = "".join(pairs[base] for base in text[::-1]) if is_turned else text
        assert DnaTokenizer().decode(ids_of_turned) == expected
    assert np.array_equal(ids, before)


def test_the_share_is_met():
    count = 100_000
    for share in (0.0, 0.1, 0.56, 1.0):
        found = np.count_nonzero(draw_reversed(1, "human/a", "chr1", count, share))
        assert abs(found - share * count) <= 4 * (count * share * (1 - share)) ** 0.5


def test_a_draw_hangs_on_seed_source_record_and_place():
    one = draw_reversed(1, "human/a", "chr1", 1000, 0.5)
    assert np.array_equal(draw_reversed(1, "human/a", "chr1", 300, 0.5), one[:300])
    others = [(2, "human/a", "chr1"), (1, "human/b", "chr1"), (1, "human/a", "chr2")]
    for other in (draw_reversed(*place, 1000, 0.5) for place in others):
        assert 400 < np.count_nonzero(one == other) < 600  # as two strangers agree


def test_a_larger_share_turns_more_and_none_back():
    some, more = (draw_reversed(1, "human/a", "chr1", 1000, share) for share in (0.4, 0.6))
    assert (more | ~some).all()


def test_draws_never_change():
    """A data set that was built can be built again, with other versions of the libraries too."""
    found = draw_reversed(1234, "human/chr20", "chr20", 12, 0.5)
    assert found.astype(int).tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]
