"""Whole builds: every token is found again in the FASTA, and a build is right or not there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep import write
from data_prep.build import build
from data_prep.manifest import file_facts
from data_prep.progress import Phase
from data_prep.schema import DataConfig
from data_prep.write import ORIGIN
from gengram_megatron.data_set import read_manifest
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import EOD
from tests.origins import Origin, Origins

SAMPLE = Path(__file__).parent.parent / "configs/data/sample.yaml"
PAIRS = {"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}
Genome = dict[str, str]


def write_fasta(path: Path, records: Genome) -> None:
    path.write_text("".join(f">{name} words\n{text}\n" for name, text in records.items()))


def slow_genome(path: Path) -> Genome:
    """Names and bases of a plain FASTA, as a person would read them."""
    genome = {}
    for block in path.read_text().split(">")[1:]:
        header, *lines = block.splitlines()
        text = "".join(lines).upper()
        genome[header.split()[0]] = "".join(base if base in "ACGT" else "N" for base in text)
    return genome


def config_of(folder: Path, **settings) -> DataConfig:
    """Two groups, human and apes, from a.fa and b.fa + c.fa of the folder."""
    groups = {
        "human": {"sources": {"a": {"fasta": "a.fa"}}},
        "apes": {"sources": {"b": {"fasta": "b.fa"}, "c": {"fasta": "c.fa"}}},
    }
    values = {"output": str(folder / "out"), "seq_length": 8, "validation": 0.25, "workers": 1}
    values |= settings
    return DataConfig.model_validate({"groups": groups, **values})


def run(folder: Path, overwrite: bool = False, **settings) -> dict | None:
    return build(config_of(folder, **settings), folder, overwrite, lambda doing, bases: None)


def documents(folder: Path, split: str) -> list[list[int]]:
    """All documents of a split through megatron-core's own IndexedDataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(folder / split))
    assert dataset.index.dtype == np.uint8
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[number].tolist() for number in range(len(dataset))]


def origins(folder: Path, split: str, seq_length: int = 8) -> list[Origin]:
    found = Origins(folder, split, seq_length)
    return [found[number] for number in range(len(found))]


def random_text(length: int, seed: int) -> str:
    return "".join(np.random.default_rng(seed).choice([*"ACGTacgt" * 4, *"NR"], length))


@pytest.fixture
def genomes(tmp_path: Path) -> Path:
    """A folder with three sources: one long record, one with many, one in between."""
    write_fasta(tmp_path / "a.fa", {"chr1": random_text(1001, 1)})
    write_fasta(tmp_path / "b.fa", {f"s{i}": random_text(30 + i, i + 2) for i in range(9)})
    write_fasta(tmp_path / "c.fa", {"chrX": random_text(300, 50), "chrY": random_text(7, 51)})
    return tmp_path


def check_round_trip(folder: Path, out: Path, seq_length: int) -> None:
    """Every document is the bases at its coordinates and EOD; no base is used twice."""
    used = {"train": set(), "validation": set()}
    for split, bases in used.items():
        found = documents(out, split)
        for document, origin in zip(found, origins(out, split, seq_length), strict=True):
            text = slow_genome(folder / f"{origin.source[-1]}.fa")[origin.record]
            bases_there = text[origin.start : origin.end]
            if origin.strand == "-":
                bases_there = "".join(PAIRS[base] for base in reversed(bases_there))
            expected = ["CGTAN".index(base) + 5 for base in bases_there]
            assert document == [*expected, EOD]
            bases.update((origin.source, origin.record, i) for i in range(origin.start, origin.end))
        assert len(bases) == len(found) * seq_length
    assert not used["train"] & used["validation"]


def test_round_trip_through_megatron_core(genomes):
    manifest = run(genomes)
    check_round_trip(genomes, genomes / "out", 8)
    for split in ("train", "validation"):
        human, apes = (manifest["groups"][group][split] for group in ("human", "apes"))
        assert human == apes > 0
        assert human + apes == len(documents(genomes / "out", split))
        assert manifest["splits"][split]["tokens"] == (human + apes) * 9


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.text("ACGTNacgtR", min_size=1, max_size=50), min_size=3, max_size=8),
    st.integers(2, 9),
    st.sampled_from([0.2, 0.5]),
    st.sampled_from([0, 0.5, 1]),
)
def test_round_trip_of_any_genome(tmp_path_factory, texts, seq_length, share, turned):
    folder = tmp_path_factory.mktemp("genome")
    for number, source in enumerate("abc"):
        records = {f"r{i}": text for i, text in enumerate(texts[number:])}
        write_fasta(folder / f"{source}.fa", {"long": f"ACGT{'ACG' * number}" * 9, **records})
    try:
        settings = {"validation": share, "max_n_fraction": 0.5, "reverse_complement": turned}
        run(folder, seq_length=seq_length, **settings)
    except UserError as error:
        assert "fragments for the" in str(error)
        assert not (folder / "out").exists()
    else:
        check_round_trip(folder, folder / "out", seq_length)
        if turned in (0, 1):
            found = origins(folder / "out", "train", seq_length)
            assert {origin.strand for origin in found} == {"+-"[turned]}


def test_a_fragment_has_one_strand_whatever_is_around_it(genomes):
    run(genomes, output=str(genomes / "one"), reverse_complement=0.5)
    config = config_of(genomes).model_dump()
    apes = config["groups"]["apes"]["sources"]
    config["groups"]["apes"]["sources"] = {"c": apes["c"], "b": apes["b"]}
    changed = {"groups": config["groups"], "validation": 0.4, "max_n_fraction": 0.3}
    run(genomes, output=str(genomes / "two"), reverse_complement=0.5, **changed)
    one, two = (
        {
            (origin.source, origin.record, origin.start): origin.strand
            for split in ("train", "validation")
            for origin in origins(genomes / name, split)
        }
        for name in ("one", "two")
    )
    both = one.keys() & two.keys()
    assert len(both) > 50 and {one[place] for place in both} == {"+", "-"}
    assert all(one[place] == two[place] for place in both)


@pytest.mark.parametrize("at_a_time", [7, 10**6])
def test_the_index_is_that_of_megatron_core(tmp_path, monkeypatch, at_a_time):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr(write, "AT_A_TIME", at_a_time)
    write.prepare_split(tmp_path, "train", count=30, tokens=9)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint8)
    for _ in range(30):
        builder.add_document(np.zeros(9, dtype=np.uint8), [9])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        ours, theirs = (tmp_path / f"{name}.{kind}" for name in ("train", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    np.save(tmp_path / "theirs.npy", np.zeros(30, dtype=ORIGIN))
    ours = (tmp_path / "train.origins.npy").read_bytes()
    assert ours == (tmp_path / "theirs.npy").read_bytes()


def test_the_manifest_accounts_for_every_base(genomes):
    manifest = run(genomes, max_n_fraction=0.2)
    assert manifest == read_manifest(genomes / "out")
    fates = ["train", "validation", "straddles", "too_many_n", "far_from_genes"]
    fates += ["left_out_of_train", "left_out_of_validation"]
    for key, facts in manifest["sources"].items():
        genome = slow_genome(genomes / facts["fasta"])
        assert facts["records"] == len(genome)
        assert facts["bases"] == sum(map(len, genome.values()))
        assert facts["fragments"] == sum(len(text) // 8 for text in genome.values())
        assert facts["bases"] == facts["fragments"] * 8 + facts["remainder_bases"]
        assert facts["fragments"] == sum(facts[fate] for fate in fates)
        for base, count in facts["composition"].items():
            assert count == sum(text.count(base) for text in genome.values())
        too_many = sum(
            text[start : start + 8].count("N") > 1.6
            for text in genome.values()
            for start in range(0, len(text) - 7, 8)
        )
        assert 0 <= too_many - facts["too_many_n"] <= facts["straddles"], key
        assert facts["sha256"] == file_facts(genomes / facts["fasta"])["sha256"]
    for name, facts in manifest["files"].items():
        assert facts == file_facts(genomes / "out" / name)


def test_the_same_build_gives_the_same_bytes(genomes):
    run(genomes, output=str(genomes / "one"))
    run(genomes, output=str(genomes / "two"))
    run(genomes, output=str(genomes / "three"), seed=5)
    one, two, three = (
        {path.name: path.read_bytes() for path in (genomes / name).iterdir()}
        for name in ("one", "two", "three")
    )
    assert one == two
    assert one["train.bin"] != three["train.bin"]


def test_line_ends_and_case_do_not_matter(genomes):
    run(genomes, output=str(genomes / "one"))
    text = (genomes / "a.fa").read_text()
    (genomes / "a.fa").write_bytes(text.replace("\n", "\r\n").lower().encode())
    run(genomes, output=str(genomes / "two"))
    for name in ("train.bin", "validation.bin", "train.idx", "train.origins.npy"):
        assert (genomes / "one" / name).read_bytes() == (genomes / "two" / name).read_bytes()


def test_weights_of_the_mix(genomes):
    config = config_of(genomes).model_dump()
    config["groups"]["human"]["weight"] = 3
    manifest = run(genomes, groups=config["groups"])
    human, apes = (manifest["groups"][group]["train_tokens"] for group in ("human", "apes"))
    assert human == 3 * apes > 0


def test_weights_by_size_use_all_of_every_group(genomes):
    config = config_of(genomes).model_dump()
    said = []
    build(config_of(genomes), genomes, False, lambda doing, bases: None, said.append)
    assert any("of group human is left out" in text for text in said)
    for group in config["groups"].values():
        group["weight"] = "size"
    said.clear()
    by_size = config_of(genomes, groups=config["groups"], output=str(genomes / "by_size"))
    manifest = build(by_size, genomes, False, lambda doing, bases: None, said.append)
    assert said == []
    check_round_trip(genomes, genomes / "by_size", 8)
    for counts in manifest["groups"].values():
        assert counts["left_out_of_train"] == counts["left_out_of_validation"] == 0
    config["groups"]["apes"]["weight"] = 2
    message = r"groups\.human\.weight is size and groups\.apes\.weight is 2"
    with pytest.raises(ValueError, match=message):
        config_of(genomes, groups=config["groups"])


def test_a_total_of_tokens(genomes):
    whole = run(genomes, output=str(genomes / "whole"))
    cut = run(genomes, total_tokens=400, reverse_complement=0.5)
    check_round_trip(genomes, genomes / "out", 8)
    human, apes = (cut["groups"][group]["train_tokens"] for group in ("human", "apes"))
    assert human == apes and human + apes == cut["splits"]["train"]["tokens"] == 396
    assert cut["splits"]["validation"] == whole["splits"]["validation"]


def test_named_records_are_held_out(genomes):
    config = config_of(genomes).model_dump()
    config["groups"]["apes"]["sources"]["b"]["validation_records"] = ["s3", "s8"]
    run(genomes, groups=config["groups"])
    held = {o.record for o in origins(genomes / "out", "validation") if o.source == "apes/b"}
    trained = {o.record for o in origins(genomes / "out", "train") if o.source == "apes/b"}
    assert held <= {"s3", "s8"} and not trained & {"s3", "s8"}


def test_keys_that_came_later_do_not_make_a_data_set_out_of_date(genomes):
    manifest = run(genomes)
    for key in ("allow_fewer", "validation_headers"):
        del manifest["settings"][key]
    (genomes / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert run(genomes) is None
    assert run(genomes, workers=2) is None  # nor does what does not change it


def without_blocks(genomes: Path, manifest: dict) -> None:
    """Make a data set one from before there was validation_blocks."""
    del manifest["settings"]["validation_blocks"]
    for group in manifest["settings"]["groups"].values():
        for source in group["sources"].values():
            del source["validation_blocks"]
    (genomes / "out" / "manifest.json").write_text(json.dumps(manifest))


def test_a_data_set_from_before_blocks_was_split_at_the_end(genomes):
    without_blocks(genomes, run(genomes, validation_blocks=1))
    assert run(genomes, validation_blocks=1) is None
    with pytest.raises(UserError, match=r"was built with other settings \(validation_blocks\)"):
        run(genomes)


def test_a_data_set_from_before_blocks_that_holds_out_what_is_named(genomes):
    groups = {"all": {"sources": {"*": {"fasta": "*.fa"}}}}
    headers = {"validation_headers": "chrX|s3|chr1", "groups": groups}
    write_fasta(genomes / "d.fa", {"other": random_text(200, 5)})
    without_blocks(genomes, run(genomes, **headers))
    assert run(genomes, **headers) is None
    groups["all"]["sources"]["*"]["validation"] = 0.25
    with pytest.raises(UserError, match="was built with other settings"):
        run(genomes, **headers)


def test_a_survey_for_other_blocks_is_not_used(genomes):
    with pytest.raises(UserError, match="hold fewer for the train split"):
        run(genomes, total_tokens=10**9)
    assert [*(genomes / "out.building" / "surveys").iterdir()]  # of 20 blocks
    assert run(genomes, validation_blocks=1) == run(
        genomes, validation_blocks=1, output=str(genomes / "fresh")
    )


def test_a_source_may_have_blocks_of_its_own(genomes):
    config = config_of(genomes).model_dump()
    config["groups"]["human"]["sources"]["a"]["validation_blocks"] = 1
    run(genomes, groups=config["groups"], validation_blocks=5)
    starts = {source: [] for source in ("human/a", "apes/c")}
    for origin in origins(genomes / "out", "validation"):
        if origin.record in ("chr1", "chrX"):
            starts[origin.source].append(origin.start)
    assert min(starts["human/a"]) >= 744  # the last 250 of 1001
    assert min(starts["apes/c"]) < 100 and max(starts["apes/c"]) > 200
    with pytest.raises(ValueError, match="validation_blocks says where a share is held out"):
        config["groups"]["human"]["sources"]["a"]["validation_records"] = ["chr1"]
        config_of(genomes, groups=config["groups"])


def test_a_source_that_was_added_makes_a_data_set_out_of_date(genomes):
    groups = {"all": {"sources": {"*": {"fasta": "*.fa"}}}}
    run(genomes, groups=groups)
    assert run(genomes, groups=groups) is None
    write_fasta(genomes / "d.fa", {"s": random_text(90, 60)})
    with pytest.raises(UserError, match=r"from other sources \(all/d changed\)"):
        run(genomes, groups=groups)


def test_an_output_that_is_up_to_date_stays(genomes):
    run(genomes)
    before = (genomes / "out" / "train.bin").stat().st_mtime_ns
    assert run(genomes) is None
    assert (genomes / "out" / "train.bin").stat().st_mtime_ns == before


def test_an_output_that_exists_is_replaced_only_on_request(genomes):
    run(genomes)
    with pytest.raises(UserError, match=r"was built with other settings \(seed\)"):
        run(genomes, seed=7)
    (genomes / "out" / "train.bin").write_bytes(b"")  # damaged, settings the same
    with pytest.raises(UserError, match=r"is damaged \(train\.bin\)"):
        run(genomes)
    assert run(genomes, overwrite=True, seed=7)["settings"]["seed"] == 7
    (genomes / "b.fa").write_text((genomes / "b.fa").read_text() + ">s9\nACGTACGT\n")
    with pytest.raises(UserError, match=r"from other sources \(apes/b changed\)"):
        run(genomes, seed=7)
    assert sorted(path.name for path in genomes.iterdir()) == ["a.fa", "b.fa", "c.fa", "out"]


def test_a_folder_that_is_no_data_set_is_never_replaced(genomes):
    (genomes / "out").mkdir()
    (genomes / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a data set"):
        run(genomes, overwrite=True)
    assert (genomes / "out" / "thesis.txt").read_text() == "years of work"


def test_a_source_that_changes_between_its_two_readings(genomes):
    def meddle(phase: Phase, amount: int) -> None:
        if phase.name == "writing":
            write_fasta(genomes / "b.fa", {f"s{i}": "ACGTACGTA" for i in range(9)})

    with pytest.raises(UserError, match=r"b\.fa was changed while it was read"):
        build(config_of(genomes), genomes, False, meddle)
    assert not (genomes / "out").exists()
    run(genomes)
    check_round_trip(genomes, genomes / "out", 8)
    assert sorted(path.name for path in genomes.iterdir()) == ["a.fa", "b.fa", "c.fa", "out"]


def take_the_place(genomes: Path) -> None:
    """A build in whose place another data set appears, so that it cannot end."""

    def meddle(phase: Phase, amount: int) -> None:
        if phase.name == "writing":
            (genomes / "out").mkdir(exist_ok=True)
            (genomes / "out" / "manifest.json").write_text("of another process")

    with pytest.raises(UserError, match="could not be written: Directory not empty"):
        build(config_of(genomes), genomes, False, meddle)


def test_an_output_that_appears_during_the_build_is_not_overwritten(genomes):
    take_the_place(genomes)
    assert (genomes / "out" / "manifest.json").read_text() == "of another process"
    shutil.rmtree(genomes / "out")
    assert run(genomes) == run(genomes, output=str(genomes / "fresh"))  # it was all but published


def test_a_build_that_was_killed_once_its_data_set_had_its_place(genomes):
    take_the_place(genomes)
    shutil.rmtree(genomes / "out")
    (genomes / "out.building" / "data").rename(genomes / "out")
    assert run(genomes) is None
    assert run(genomes, overwrite=True) == run(genomes, output=str(genomes / "fresh"))
    assert not (genomes / "out.building").exists()


def test_the_sample_that_is_shipped(tmp_path):
    from gengram_megatron.config.load import load_config

    config = load_config(SAMPLE, [f"output={json.dumps(str(tmp_path / 'out'))}"], DataConfig)
    manifest = build(config, SAMPLE.parent, False, lambda doing, bases: None)
    human, apes = manifest["groups"]["human"], manifest["groups"]["apes"]
    assert (human["train"], human["validation"]) == (apes["train"], apes["validation"])
    assert (human["train"], human["validation"]) == (7296, 339)
    borders = [o for o in origins(tmp_path / "out", "validation", 512) if o.source == "human/chr20"]
    assert min(origin.start for origin in borders) >= 3_800_000
