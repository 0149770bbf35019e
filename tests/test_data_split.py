"""The split and the mix, against obvious loops over single bases and fragments."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.fasta import read_fasta
from data_prep.fragment import Fate, Record, add_n, count_n, drop_n, grid
from data_prep.mix import balance, loss_by_weights
from data_prep.schema import DataConfig, Source
from data_prep.split import Regions, assign, held_out
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import BASE_IDS

HUMAN = Path(__file__).parent.parent / "sample_data/human_GRCh37_chr20_30M-34M.fa.gz"
GROUPS = {"g": {"sources": {"x": {"fasta": "x.fa"}}}}
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


def records_of(lengths, seq_length=4):
    return [
        Record(f"r{number}", length, np.zeros(length // seq_length, dtype=np.uint32))
        for number, length in enumerate(lengths)
    ]


def regions_of(records, share=0.5, blocks=1, seq_length=4, kept=None, **source) -> Regions:
    """What held_out says of a source; without `kept`, no fragment is dropped by another rule."""
    settings = {"output": "x", "seq_length": seq_length, "groups": GROUPS}
    settings |= {"validation": share, "validation_blocks": blocks}
    kept = kept or [np.ones(len(record.n_bases), dtype=bool) for record in records]
    config = DataConfig.model_validate(settings)
    return held_out(Source(fasta="x.fa", **source), config, records, kept)


def fates_of(records, regions, seq_length=4, kept=None) -> list[np.ndarray]:
    """The fates of the fragments of each record, TOO_MANY_N where they are not kept."""
    found = []
    for number, record in enumerate(records):
        fates = np.full(len(record.n_bases), Fate.TRAIN, dtype=np.uint8)
        if kept:
            fates[~kept[number]] = Fate.TOO_MANY_N
        assign(fates, record, regions, seq_length)
        found.append(fates)
    return found


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
@given(LENGTHS, st.floats(0, 0.99), st.integers(1, 7), st.sampled_from([1, 2, 3, 20]))
def test_no_base_is_in_both_splits(lengths, share, seq_length, blocks):
    records = records_of(lengths, seq_length)
    regions = regions_of(records, share, blocks, seq_length)
    held = held_bases(regions, records)
    for record, fates in zip(records, fates_of(records, regions, seq_length)):
        for number, fate in enumerate(fates):
            bases = held[record.name][number * seq_length : (number + 1) * seq_length]
            expected = Fate.VALIDATION if all(bases) else Fate.STRADDLES
            assert fate == (expected if any(bases) else Fate.TRAIN)


@settings(deadline=None)  # the machine may be busy
@given(LENGTHS, st.floats(0, 0.99))
def test_the_share_at_the_end_of_a_file(lengths, share):
    records = records_of(lengths)
    held = held_bases(regions_of(records, share), records)
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
    for blocks in (1, 20):
        assert regions_of(records, blocks=blocks, validation_records=["r1"]) == {"r1": [(0, 20)]}
        named = regions_of(
            records, blocks=blocks, validation_regions=["r0:13-20", "r0:1-4", "r2:1-1"]
        )
        assert named == {"r0": [(0, 4), (12, 20)], "r2": [(0, 1)]}


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
        regions_of(records_of([20]), validation_regions=regions)


def kept_by(rule: str, records: list[Record], seed: int) -> list[np.ndarray]:
    """Which fragments no other rule drops: all, those near genes of which some parts of a record
    have many, or those outside a gap of N in the middle."""
    random, found = np.random.default_rng(seed), []
    for record in records:
        count = len(record.n_bases)
        kept = np.ones(count, dtype=bool)
        if rule == "genes":
            kept = np.repeat(random.random(-(-count // 5)) < 0.4, 5)[:count]
        elif rule == "gap":
            kept[count // 3 : count // 2] = False
        found.append(kept)
    return found


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.one_of(st.integers(1, 60), st.integers(1, 4000)), min_size=1, max_size=12),
    st.floats(0, 0.99),
    st.integers(2, 25),
    st.sampled_from(["all", "genes", "gap"]),
    st.integers(0, 3),
)
def test_blocks_have_the_share_of_what_other_rules_keep(lengths, share, blocks, rule, seed):
    records = records_of(lengths)
    kept = kept_by(rule, records, seed)
    regions = regions_of(records, share, blocks, kept=kept)
    fates = fates_of(records, regions, kept=kept)
    sizes = [int(mask.sum()) for mask in kept]
    counts = [int(np.count_nonzero(fate == Fate.VALIDATION)) for fate in fates]
    assert abs(sum(counts) - share * sum(sizes)) <= 0.5 + 1e-6
    assert Fate.STRADDLES not in np.concatenate(fates)
    for record in records:
        spans = regions.get(record.name, [])
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
        assert all(0 <= start < end <= record.length for start, end in spans)
        assert len(spans) <= blocks
    long = [number for number, size in enumerate(sizes) if share * size >= blocks]
    assert all(abs(counts[number] - share * sizes[number]) <= 1 for number in long)
    cut = [number for number in long if counts[number] < sizes[number]]
    expected = [min(blocks, counts[number]) for number in cut]
    assert [len(regions[records[number].name]) for number in cut] == expected


@pytest.mark.parametrize("rule", ["all", "genes", "gap"])
@pytest.mark.parametrize(("length", "blocks"), [(40_000, 20), (40_003, 20), (5_600, 7)])
def test_blocks_are_spread_evenly_over_a_record_and_not_at_its_ends(rule, length, blocks):
    records = records_of([length])
    kept = kept_by(rule, records, 1)
    regions = regions_of(records, 0.05, blocks, kept=kept)
    fates = fates_of(records, regions, kept=kept)[0][kept[0]]
    held = np.flatnonzero(fates == Fate.VALIDATION)
    borders = np.flatnonzero(np.diff(held) > 1) + 1
    runs = np.split(held, borders)
    assert len(runs) == blocks
    sizes = [len(run) for run in runs]
    assert max(sizes) - min(sizes) <= 1
    middles = np.array([run.mean() + 0.5 for run in runs])
    expected = (np.arange(blocks) + 0.5) / blocks * len(fates)
    assert np.abs(middles - expected).max() <= 2
    assert held[0] > len(fates) / blocks / 3 and held[-1] < len(fates) * (1 - 1 / blocks / 3)


def gc_gaps(gc: np.ndarray, blocks: int) -> np.ndarray:
    """Mean of validation less that of training, for a split moved to each place along a record."""
    records = records_of([4 * len(gc)])
    held = fates_of(records, regions_of(records, 0.05, blocks))[0] == Fate.VALIDATION
    moved = [np.roll(held, step) for step in range(0, len(gc), 11)]
    return np.array([gc[mask].mean() - gc[~mask].mean() for mask in moved])


def test_the_composition_of_blocks_is_that_of_the_record():
    telomeres = np.full(8000, 0.44)
    telomeres[:400] = telomeres[-400:] = 0.56
    assert gc_gaps(telomeres, 1)[0] > 0.1  # the end is one
    assert abs(gc_gaps(telomeres, 20)[0]) < 0.015
    # The DNA that is shipped has no telomere; over all places it is the same.
    ((_, ids),) = read_fasta(HUMAN)
    gc = np.isin(grid(ids, 512), BASE_IDS[1:3]).mean(axis=1)
    one, twenty = (np.sqrt(np.mean(gc_gaps(gc, blocks) ** 2)) for blocks in (1, 20))
    assert one == pytest.approx(0.024, abs=0.001) and twenty == pytest.approx(0.011, abs=0.001)


@pytest.mark.parametrize("order", ["as they are", "reversed", "one long one among them"])
def test_short_records_stay_whole_and_come_from_all_over_the_file(order):
    lengths = np.random.default_rng(3).integers(24, 120, 400).tolist()  # 6 to 29 fragments
    lengths = lengths[::-1] if order == "reversed" else lengths
    if order == "one long one among them":
        lengths.insert(137, 30_000)
    records = records_of(lengths)
    regions = regions_of(records, 0.05, 20)
    whole = {record.name for record in records if regions.get(record.name) == [(0, record.length)]}
    cut = {record.name for record in records if record.name in regions} - whole
    short = {record.name for record in records if record.length < 200}
    assert whole <= short and len(cut & short) <= 1
    places = np.array(sorted(int(name[1:]) for name in whole))
    assert 15 <= len(places) <= 25
    gaps = np.diff(places, prepend=-1, append=len(records))
    assert gaps.max() <= 60  # 20 on average, and the whole file is 400
    held = [lengths[place] for place in places]
    assert abs(np.mean(held) - np.mean([it for it in lengths if it < 200])) < 20


def test_records_too_long_to_be_held_out_whole_are_cut():
    # Twelve chromosomes of 30 to 190 fragments: 0.05 of them all is 66, so none but the smallest
    # would fit whole, and none gives 20 fragments.
    sizes = [30, 190, 60, 150, 100, 170, 40, 90, 120, 180, 110, 80]
    records = records_of([4 * size for size in sizes])
    regions = regions_of(records, 0.05, 20)
    assert set(regions) == {record.name for record in records}
    for record, size in zip(records, sizes):
        assert sum(end - start for start, end in regions[record.name]) <= 4 * (0.05 * size + 1)
        assert regions[record.name][0][0] > 0 and regions[record.name][-1][1] < record.length


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
        "total_tokens is 1,000, but the sources hold fewer for the train split: "
        "group human has 300 tokens of 500 (would be repeated 1.67 times); "
        "group apes has 1,000 tokens of 500 (enough); "
        "add sources, set total_tokens to at most 600, or set allow_fewer to true to use all that "
        "they hold"
    )
    said = balance(fates, {"human": 1, "apes": 1}, 1, 10, 1000, allow_fewer=True)
    assert str(refused.value).startswith(f"{said}; add sources")
    assert [np.count_nonzero(fate == Fate.TRAIN) for fate in fates.values()] == [30, 30]


def split_fates(**sizes: tuple[int, int]) -> dict[str, np.ndarray]:
    """For each group, fragments of the train and of the validation split."""
    kinds = np.uint8([Fate.TRAIN, Fate.VALIDATION])
    return {group: np.repeat(kinds, counts) for group, counts in sizes.items()}


def counts_of(fates: dict[str, np.ndarray], fate: Fate) -> dict[str, int]:
    return {group: int(np.count_nonzero(own == fate)) for group, own in fates.items()}


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 900)),
)
def test_weights_by_size_keep_all_or_the_same_part_of_each_group(sizes, total):
    fates = split_fates(**{str(number): size for number, size in enumerate(sizes)})
    have, weights = counts_of(fates, Fate.TRAIN), None
    whole, keep = sum(have.values()), None if total is None else total // 4
    if keep is not None and not 0 < keep <= whole:
        with pytest.raises(UserError, match="total_tokens"):
            balance(fates, weights, 1, 4, total)
        if keep:
            assert balance(fates, weights, 1, 4, total, allow_fewer=True)
            assert counts_of(fates, Fate.TRAIN) == have
        return
    assert balance(fates, weights, 1, 4, total) is None
    kept = counts_of(fates, Fate.TRAIN)
    assert sum(kept.values()) == (whole if keep is None else keep)
    share = sum(kept.values()) / whole
    assert all(abs(kept[group] - share * have[group]) <= 1 for group in have)
    assert counts_of(fates, Fate.VALIDATION) == {str(i): size[1] for i, size in enumerate(sizes)}
    assert loss_by_weights(fates, weights, 4) is None


def test_what_weights_leave_out_is_said_with_its_numbers():
    fates = split_fates(human=(1000, 50), apes=(40, 48))
    weights = {"human": 1, "apes": 1}
    balance(fates, weights, 1, 10, None)
    said = loss_by_weights(fates, weights, 10)
    assert "96.0 % of group human is left out of the train split" in said
    assert "(960 fragments, 9,600 tokens; used: 40 fragments, 400 tokens)" in said
    assert "validation" not in said  # of it, 4 % are left out
    assert "weight: size" in said and "data.blend" in said


@pytest.mark.parametrize(
    ("sizes", "weights", "total"),
    [
        ({"human": (100, 50), "apes": (91, 46)}, {"human": 1, "apes": 1}, None),
        ({"human": (1000, 50), "apes": (100, 50)}, {"human": 1, "apes": 1}, 1000),
        ({"human": (100, 40), "apes": (50, 20)}, {"human": 2, "apes": 1}, None),
        ({"human": (100, 40)}, {"human": 7}, None),
    ],
    ids=["nearly even", "the total leaves them out", "in the ratio", "one group"],
)
def test_nothing_is_said_where_weights_leave_little_out(sizes, weights, total):
    fates = split_fates(**sizes)
    balance(fates, weights, 1, 10, total)
    assert loss_by_weights(fates, weights, 10) is None
