"""The split and the mix, against obvious loops over single bases and fragments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.fragment import Fate, Record, add_n, count_n, drop_n
from data_prep.mix import balance
from data_prep.schema import Source
from data_prep.split import assign, held_out
from gengram_megatron.errors import UserError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def records_of(lengths, seq_length=4):
    return [
        Record(f"r{number}", length, np.zeros(length // seq_length, dtype=np.uint32))
        for number, length in enumerate(lengths)
    ]


def held_bases(regions, records) -> dict[str, list[bool]]:
    """For each base of each record, whether a region covers it."""
    return {
        record.name: [
            any(start <= base < end for start, end in regions.get(record.name, []))
            for base in range(record.length)
        ]
        for record in records
    }


@settings(deadline=None)  # the machine may be busy
@given(LENGTHS, st.floats(0, 0.99), st.integers(1, 7))
def test_no_base_is_in_both_splits(lengths, share, seq_length):
    records = records_of(lengths, seq_length)
    regions = held_out(Source(fasta="x"), share, records)
    held = held_bases(regions, records)
    for record in records:
        for number, fate in enumerate(assign(record, regions, seq_length)):
            bases = held[record.name][number * seq_length : (number + 1) * seq_length]
            expected = Fate.VALIDATION if all(bases) else Fate.STRADDLES
            assert fate == (expected if any(bases) else Fate.TRAIN)


@settings(deadline=None)  # the machine may be busy
@given(LENGTHS, st.floats(0, 0.99))
def test_the_share_at_the_end_of_a_file(lengths, share):
    records = records_of(lengths)
    held = held_bases(held_out(Source(fasta="x"), share, records), records)
    flags = [flag for record in records for flag in held[record.name]]
    budget = round(share * sum(lengths))
    assert flags == sorted(flags)  # one stretch, at the end of the file
    assert sum(flags) <= budget
    first = next((record for record in reversed(records) if not all(held[record.name])), None)
    if sum(flags) < budget:  # what is missing is due to one short record, which stays whole
        assert first.length <= budget and not any(held[first.name])
        assert sum(flags) + first.length > budget


def test_named_records_and_regions():
    records = records_of([20, 20, 20])
    source = Source(fasta="x.fa", validation_records=["r1"])
    assert held_out(source, 0.5, records) == {"r1": [(0, 20)]}
    source = Source(fasta="x.fa", validation_regions=["r0:13-20", "r0:1-4", "r2:1-1"])
    assert held_out(source, 0.5, records) == {"r0": [(0, 4), (12, 20)], "r2": [(0, 1)]}


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (["r9:1-4"], "has no record r9"),
        (["r0"], "not of the form record:first-last"),
        (["r0:0-4"], "does not lie inside r0"),
        (["r0:5-21"], "does not lie inside r0, which has bases 1 to 20"),
        (["r0:1-8", "r0:8-9"], "overlap"),
    ],
)
def test_wrong_regions_are_refused(regions, message):
    with pytest.raises(UserError, match=message):
        held_out(Source(fasta="x.fa", validation_regions=regions), 0, records_of([20]))


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.text("ACGN", min_size=1, max_size=40), min_size=1),
    st.integers(1, 9),
    st.sampled_from([0, 0.1, 0.5]),
)
def test_fragments_with_too_many_n(blocks, seq_length, most):
    counts, text = [], ""
    for block in blocks:
        ids = np.array([9 if letter == "N" else 8 for letter in block], dtype=np.uint8)
        if "N" in block:
            counts.append(count_n(len(text), ids, seq_length))
        text += block
    record = Record("r", len(text), add_n(counts, len(text), seq_length))
    assert len(record.n_bases) == len(text) // seq_length
    fates = np.zeros(len(record.n_bases), dtype=np.uint8)
    drop_n(fates, record, seq_length, most)
    for number, fate in enumerate(fates):
        part = text[number * seq_length : (number + 1) * seq_length]
        assert (fate == Fate.TOO_MANY_N) == (part.count("N") > most * seq_length)


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(3, 40), st.integers(3, 40), st.integers(1, 3)), min_size=1),
    st.integers(0, 5),
)
def test_the_mix_is_exact_and_as_large_as_it_can_be(sizes, seed):
    fates = {
        str(number): np.repeat(np.uint8([Fate.TRAIN, Fate.STRADDLES, Fate.VALIDATION]), [a, 2, b])
        for number, (a, b, _) in enumerate(sizes)
    }
    weights = {str(number): weight for number, (*_, weight) in enumerate(sizes)}
    before = {group: fate.copy() for group, fate in fates.items()}
    balance(fates, weights, seed, 5, None)
    for place, split in enumerate((Fate.TRAIN, Fate.VALIDATION)):
        unit = min(size[place] // size[2] for size in sizes)
        for group, fate in fates.items():
            assert np.count_nonzero(fate == split) == unit * weights[group]
    for group, fate in fates.items():
        left_out = (fate == Fate.LEFT_OUT_OF_TRAIN) | (fate == Fate.LEFT_OUT_OF_VALIDATION)
        assert (fate[~left_out] == before[group][~left_out]).all()


def test_the_seed_alone_decides_what_the_mix_leaves_out():
    def mixed(seed: int) -> list[int]:
        fates = {
            "many": np.repeat(np.uint8([Fate.TRAIN, Fate.VALIDATION]), 50),
            "few": np.repeat(np.uint8([Fate.TRAIN, Fate.VALIDATION]), 25),
        }
        balance(fates, {"many": 1, "few": 1}, seed, 5, None)
        return fates["many"].tolist()

    assert mixed(1) == mixed(1) != mixed(2)


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(3, 40), st.integers(1, 3)), min_size=1, max_size=4),
    st.integers(1, 600),
    st.integers(2, 5),
)
def test_a_total_is_met_without_repeating_or_refused(sizes, total, tokens):
    fates = {
        str(number): np.repeat(np.uint8([Fate.TRAIN, Fate.VALIDATION]), [size, 3])
        for number, (size, _) in enumerate(sizes)
    }
    weights = {str(number): weight for number, (_, weight) in enumerate(sizes)}
    expected, one_round = 0, sum(weights.values()) * tokens
    while (expected + 1) * one_round <= total:
        expected += 1
    short = [str(i) for i, (size, weight) in enumerate(sizes) if size < expected * weight]
    if expected == 0 or short:
        with pytest.raises(UserError, match="total_tokens") as refused:
            balance(fates, weights, 1, tokens, total)
        assert str(refused.value).count("would be repeated") == len(short)
        return
    balance(fates, weights, 1, tokens, total)
    for group, fate in fates.items():
        assert np.count_nonzero(fate == Fate.TRAIN) == expected * weights[group]
        assert np.count_nonzero(fate == Fate.VALIDATION) <= 3  # balanced, not cut to the total


def test_a_total_that_the_sources_do_not_hold():
    fates = {
        group: np.repeat(np.uint8([Fate.TRAIN, Fate.VALIDATION]), [size, 1])
        for group, size in (("human", 30), ("apes", 100))
    }
    with pytest.raises(UserError) as refused:
        balance(fates, {"human": 1, "apes": 1}, 1, 10, 1000)
    assert str(refused.value) == (
        "total_tokens is 1,000, and the sources hold fewer for the train split: "
        "group human has 300 tokens of 500 (would be repeated 1.67 times); "
        "group apes has 1,000 tokens of 500 (enough); "
        "add sources, ask for at most 600, or set allow_fewer to true for all that there are"
    )
    said = balance(fates, {"human": 1, "apes": 1}, 1, 10, 1000, allow_fewer=True)
    assert str(refused.value).startswith(f"{said}; add sources")
    assert [np.count_nonzero(fate == Fate.TRAIN) for fate in fates.values()] == [30, 30]
