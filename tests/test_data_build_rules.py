"""All rules of a build at once, against an obvious program that looks at single bases."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.schema import DataConfig
from data_prep.write import draw_reversed
from gengram_megatron.errors import UserError
from tests.origins import Origins

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A folder in memory, because a build waits for the disk to have all that it wrote."""

PAIRS = dict(zip("ACGTN", "TGCAN"))
IDS = dict(zip("CGTAN", range(5, 10)))

genes_of_record = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=2)
record = st.tuples(
    st.text("ACGTNacgtnRYK", min_size=1, max_size=120), genes_of_record, st.booleans()
)
rules = st.fixed_dictionaries(
    {
        "seq_length": st.integers(1, 9),
        "max_n_fraction": st.sampled_from([0, 0.25, 1]),
        "gene_distance": st.sampled_from([None, 0, 3, 11]),
        "reverse_complement": st.sampled_from([0, 0.5, 1]),
        "validation": st.sampled_from([0.1, 0.5]),
        "validation_blocks": st.sampled_from([1, 1, 2, 20]),
        "validation_headers": st.sampled_from([None, "held"]),
    }
)


def slow_documents(records: list, config: DataConfig, split: str) -> list[tuple]:
    """Record, start, strand and tokens of every document of a split."""
    held = slow_held_out(records, config)
    found = []
    for number, (text, genes, _) in enumerate(records):
        bases = "".join(base if base in "ACGT" else "N" for base in text.upper())
        length = config.seq_length
        genes = [(first, size) for first, size in genes if first < len(bases)]
        turned = draw_reversed(
            config.seed, "g/x", f"r{number}", len(bases) // length, config.reverse_complement
        )
        for place in range(len(bases) // length):
            start, end = place * length, (place + 1) * length
            inside = [(number, base) in held for base in range(start, end)]
            fragment = bases[start:end]
            if all(inside) if split == "validation" else not any(inside):
                if fragment.count("N") > config.max_n_fraction * length:
                    continue
                if config.gene_distance is not None and not slow_near(start, end, genes, config):
                    continue
                if turned[place]:
                    fragment = "".join(PAIRS[base] for base in reversed(fragment))
                tokens = [*(IDS[base] for base in fragment), 12]
                found.append((f"r{number}", start, "+-"[int(turned[place])], tokens))
    return found


def slow_splits(records: list, config: DataConfig) -> dict[str, list[tuple]]:
    """The documents of both splits; with blocks, only their numbers are those of each split."""
    if config.validation_blocks == 1 or config.validation_headers is not None:
        return {split: slow_documents(records, config, split) for split in ("train", "validation")}
    whole = slow_documents(records, config.model_copy(update={"validation": 0}), "train")
    count = round(config.validation * len(whole))
    return {"train": whole[count:], "validation": whole[:count]}


def slow_held_out(records: list, config: DataConfig) -> set[tuple[int, int]]:
    """The bases that are for validation, as record and place."""
    if config.validation_headers is not None:
        return {
            (number, base)
            for number, (text, _, held) in enumerate(records)
            for base in range(len(text))
            if held
        }
    budget = round(config.validation * sum(len(text) for text, *_ in records))
    left, held = budget, set()
    for number in reversed(range(len(records))):
        length = len(records[number][0])
        taken = length if length <= left else left if length > budget else 0
        held |= {(number, base) for base in range(length - taken, length)}
        left -= taken
        if taken < length:
            break
    return held


def slow_near(start: int, end: int, genes: list, config: DataConfig) -> bool:
    reach = range(start - config.gene_distance - 1, end + config.gene_distance + 1)
    return any(first <= base < first + size for first, size in genes for base in reach)


def write_genome(folder: Path, records: list) -> None:
    lines, genes = [], []
    for number, (text, spans, held) in enumerate(records):
        lines += [f">r{number} {'held' if held else 'kept'}", text[:50], text[50:]]
        for first, size in spans:
            last = min(first + size, len(text))
            if last > first:
                genes.append(f"r{number}\t{first}\t{last}")
    (folder / "x.fa").write_text("\n".join(lines))
    (folder / "x.bed").write_text("\n".join([*genes, "not_here 0 1"]))


def slow_failure(records: list, config: DataConfig, expected: dict) -> bool:
    """Whether there is nothing to build: no base, no fragment, or none for one of the splits."""
    no_base = all(set(text.upper()) <= set("NRYK") for text, *_ in records)
    too_short = max(len(text) for text, *_ in records) < config.seq_length
    return no_base or too_short or not all(expected.values())


def found_documents(folder: Path, config: DataConfig, split: str) -> list[tuple]:
    """Record, start, strand and tokens of every document that was built."""
    tokens = np.fromfile(folder / f"{split}.bin", dtype=np.uint8)
    origins = Origins(folder, split, config.seq_length)
    rows = tokens.reshape(-1, config.seq_length + 1).tolist()
    places = (origins[number] for number in range(len(origins)))
    return [(it.record, it.start, it.strand, row) for it, row in zip(places, rows, strict=True)]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(record, min_size=1, max_size=6), rules)
def test_a_build_against_one_that_looks_at_every_base(records, values):
    names = {
        f"r{number}": f"r{number}" if any(first < len(text) for first, _ in genes) else None
        for number, (text, genes, _) in enumerate(records)
    }
    source = {"fasta": "x.fa", "annotation": "x.bed", "annotation_names": names}
    settings = {"output": "out", "workers": 1, "groups": {"g": {"sources": {"x": source}}}}
    config = DataConfig.model_validate(settings | values)
    expected = slow_splits(records, config)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        write_genome(Path(folder), records)
        config.output = f"{folder}/out"
        try:
            build(config, Path(folder), False, lambda doing, bases: None)
        except UserError as error:
            assert slow_failure(records, config, expected), error
            return
        assert not slow_failure(records, config, expected)
        found = {split: found_documents(Path(config.output), config, split) for split in expected}
        if config.validation_blocks == 1 or config.validation_headers is not None:
            assert found == expected
            return
        # Which fragments the blocks have is for the tests of the split; here, how many, and that
        # the two splits are all that there is.
        count = len(expected["validation"])
        both = found["train"] + found["validation"]
        assert len(found["validation"]) == count and len(found["train"]) == len(expected["train"])
        assert sorted(both) == sorted(expected["train"] + expected["validation"])
