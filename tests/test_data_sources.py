"""Patterns for many files, chromosomes held out by header, and the paper's sets on small
genomes."""

import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.download.schema import DownloadConfig
from data_prep.fragment import Record
from data_prep.schema import DataConfig, Source
from data_prep.sources import inputs
from data_prep.split import held_out, with_chromosomes
from gengram_megatron.config.load import load_config
from gengram_megatron.errors import UserError
from tests.origins import Origins

CONFIGS = Path(__file__).parent.parent / "configs/data"
SETS = {1: "set1_50b_8k.yaml", 2: "set2_200b_8k.yaml", 3: "set3_100b_32k.yaml"}


def config_of(sources: dict, **values) -> DataConfig:
    base = {"output": "out", "seq_length": 8, "workers": 1, "groups": {"g": {"sources": sources}}}
    return DataConfig.model_validate(base | values)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("b_v1.fa", "a_v2.fa", "ab_v1.fa", "a_v2.bed", "other.fna"):
        (tmp_path / name).write_text("")
    return tmp_path


def found(folder: Path, config: DataConfig) -> dict[str, list[str]]:
    return {it.key: [path.name for path in it.files.values()] for it in inputs(config, folder)}


def test_a_pattern_stands_for_all_its_files_in_order(folder):
    assert found(folder, config_of({"*": {"fasta": "*.fa"}})) == {
        "g/a_v2": ["a_v2.fa"],
        "g/ab_v1": ["ab_v1.fa"],
        "g/b_v1": ["b_v1.fa"],
    }
    some = config_of({"*": {"fasta": "*.fa", "only": ["b", "a_"]}, "x": {"fasta": "other.fna"}})
    assert [*found(folder, some)] == ["g/a_v2", "g/b_v1", "g/x"]


def test_a_pattern_stands_for_the_one_file_of_a_source(folder):
    assert found(folder, config_of({"x": {"fasta": "a_*.fa"}})) == {"g/x": ["a_v2.fa"]}


def test_a_file_that_goes_away(folder):
    (source,) = inputs(config_of({"x": {"fasta": "a_*.fa"}}), folder)
    source.path.unlink()
    with pytest.raises(UserError, match=r"a_v2\.fa cannot be read: No such file or directory"):
        source.stamps()


def test_files_beside_those_of_a_pattern(folder):
    sources = {"*": {"fasta": "*.fa", "annotation": "*.bed", "without_annotation": "keep"}}
    assert found(folder, config_of(sources, gene_distance=5)) == {
        "g/a_v2": ["a_v2.fa", "a_v2.bed"],
        "g/ab_v1": ["ab_v1.fa"],
        "g/b_v1": ["b_v1.fa"],
    }
    assert found(folder, config_of(sources))["g/a_v2"] == ["a_v2.fa"]  # genes are not asked for
    del sources["*"]["without_annotation"]
    with pytest.raises(UserError, match=r"ab_v1\.bed: there is no such file \(source g/ab_v1\)"):
        found(folder, config_of(sources, gene_distance=5))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"*": {"fasta": "*.fasta"}}, r"has no file \*\.fasta \(source g/\*\); fetch it with"),
        ({"*": {"fasta": "*.fa", "only": ["a", "z"]}}, r"has no file z\*\.fa \(source g/\*\)"),
        ({"x": {"fasta": "a*.fa"}}, r"source g/x is one file, but a\*\.fa matches 2"),
        ({"*": {"fasta": "b_v1.fa"}}, r"source g/\*: its fasta has no \*"),
        (
            {"*": {"fasta": "*.fa"}, "b_v1": {"fasta": "b_v1.fa"}},
            r"two sources are called g/b_v1, one by the \* of groups\.g\.sources",
        ),
        ({"*": {"fasta": "*"}}, ""),
    ],
)
def test_patterns_that_cannot_be_meant(folder, sources, message):
    (folder / "an odd name").write_text("")
    if not message:
        message = "an odd name would be a source called 'an odd name'; rename the file"
    with pytest.raises(UserError, match=message):
        inputs(config_of(sources), folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"fasta": "*/a.fa"}, "one \\*, in the file's name"),
        ({"fasta": "*_*.fa"}, "one \\*, in the file's name"),
        ({"fasta": "a.fa", "annotation": "*.bed"}, "annotation has a \\*, but fasta has none"),
        ({"fasta": "a.fa", "only": ["a"]}, r"only needs a fasta with a \*"),
        ({"fasta": "a.fa", "validation_headers": "chr("}, "not a regular expression"),
    ],
)
def test_sources_that_cannot_be_meant(source, message):
    with pytest.raises(ValueError, match=message):
        config_of({"x": source})


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.sampled_from(["X", "Y", "XA", "10", "chrX_1", "chromosome X, a", ""]), min_size=1)
)
def test_records_held_out_by_their_headers(words):
    records = [
        Record(f"r{i}", 9, np.zeros(1, dtype=np.uint32), f"r{i} ape chr{word} genome")
        for i, word in enumerate(words)
    ]
    source = Source(fasta="x", validation_headers="chr[XY]\\b")
    regions = held_out(source, config_of({"x": source}), records, [])
    held = [f"r{i}" for i, word in enumerate(words) if word in ("X", "Y")]
    assert regions == {name: [(0, 9)] for name in held}


def test_headers_held_out_in_all_sources_that_say_nothing_else(folder):
    sources = {"x": {"fasta": "b_v1.fa"}, "y": {"fasta": "other.fna", "validation": 0.5}}
    one, other = inputs(config_of(sources, validation_headers="chrX"), folder)
    assert one.settings.validation_headers == "chrX" and other.settings.validation_headers is None


def test_a_table_of_chromosomes(tmp_path):
    records = [Record(name, 9, np.zeros(1), name) for name in ("r1", "r2", "r3")]
    path = tmp_path / "x.chromAlias.txt"
    path.write_text("# assembly\tucsc\tgenbank\nr1\tchr1\tCM1\nr2\tchrX_2_random\tJB2\n")
    headers = [record.header for record in with_chromosomes(records, path)]
    assert headers == ["r1 chr1\tCM1", "r2 chrX_2_random\tJB2", "r3"]
    path.write_text("other\tchr1\n")
    with pytest.raises(UserError, match=r"chromAlias\.txt has none of the records .* such as r1"):
        with_chromosomes(records, path)


def lists_of(number: int) -> tuple[DataConfig, DownloadConfig]:
    data = load_config(CONFIGS / SETS[number], [], DataConfig)
    return data, load_config(CONFIGS / f"download/set{number}.yaml", [], DownloadConfig)


@pytest.mark.parametrize("number", SETS)
def test_the_papers_sets_use_what_their_lists_download(number):
    data, wanted = lists_of(number)
    own = [re.sub(r".*/(GC._\d+\.\d)_.*", r"\1", source.fasta) for source in primates(data)]
    assert own == wanted.ncbi.assemblies
    human = data.groups["human"].sources
    assert {*human["*"].only, *human} - {"*"} == {*wanted.indexes["hprc"].rows["sample_id"]}
    assert [*human["*"].only] == wanted.indexes["hprc_chromosomes"].rows["sample_id"]
    assert (data.gene_distance is not None) == ("hprc_genes" in wanted.indexes)
    assert all((source.annotation is not None) == (number < 3) for source in primates(data))


def primates(data: DataConfig) -> list[Source]:
    return [*data.groups["primates"].sources.values()]


@pytest.mark.parametrize(
    ("number", "tokens", "length", "distance", "reverse"),
    [(1, 50e9, 8192, 5120, 0), (2, 205.4e9, 8192, 5120, 0), (3, 100e9, 32768, None, 0.56)],
)
def test_the_papers_sets_are_what_the_paper_says(number, tokens, length, distance, reverse):
    data, _ = lists_of(number)
    assert data.total_tokens % (2 * (length + 1)) == 0
    assert data.total_tokens == pytest.approx(tokens, rel=1e-3)
    assert (data.seq_length, data.gene_distance) == (length, distance)
    assert data.reverse_complement == reverse
    assert [group.weight for group in data.groups.values()] == [1, 1]


def genome(path: Path, seed: int, headers: list[str]) -> None:
    dice = np.random.default_rng(seed)
    records = [f">{it}\n{''.join(dice.choice([*'ACGT'], 3_000))}\n" for it in headers]
    path.write_bytes(gzip.compress("".join(records).encode(), 1))


@pytest.mark.parametrize("number", SETS)
def test_the_papers_sets_on_small_genomes(tmp_path, number):
    """The files have the names that NCBI and HPRC give them, and headers of the same form."""
    data, wanted = lists_of(number)
    (tmp_path / "genomes").mkdir()
    accessions = wanted.ncbi.assemblies
    for seed, accession in enumerate(accessions):
        path = tmp_path / f"genomes/{accession}_ASM1v{seed}_genomic.fna.gz"
        kinds = ("X", "12") if seed else ("Un", "12")  # the first does not name its X
        headers = [f"CM{kind}.1 Ape isolate 1 chromosome {kind}, whole genome" for kind in kinds]
        genome(path, seed, headers)
    genes = tmp_path / f"genomes/{accessions[1]}_ASM1v1_genomic.gff.gz"
    genes.write_bytes(gzip.compress(b"CM12.1\tme\tgene\t1\t9\t.\t+\t.\tID=a\n"))
    for seed, sample in enumerate(data.groups["human"].sources["*"].only, 1000):
        path = tmp_path / f"genomes/{sample}_mat_hprc_r2_v1.0.1.fa.gz"
        genome(path, seed, [f"{sample}#2#CM1.1", f"{sample}#2#CM2.1"])
        alias = f"{sample}#2#CM1.1\tchrX\tCM1.1\n{sample}#2#CM2.1\tchr2_CM2_random\tCM2.1\n"
        path.with_name(path.name.replace(".fa.gz", ".chromAlias.txt")).write_text(alias)
    reference = "GCA_000001405.15_GRCh38_no_alt_analysis_set.PanSN.fa.gz"
    genome(tmp_path / "genomes" / reference, 2000, ["GRCh38#0#chrX", "GRCh38#0#chr1"])
    (tmp_path / "configs/data").mkdir(parents=True)
    path = Path(shutil.copy(CONFIGS / SETS[number], tmp_path / "configs/data"))
    out = tmp_path / "out"
    words = [f"output={out}", "seq_length=64", "workers=1", "total_tokens=10_000_000"]
    said: list[str] = []
    config = load_config(path, words, DataConfig)
    manifest = build(config, path.parent, False, lambda doing, bases: None, said.append)
    assert len(manifest["sources"]) == len(inputs(data, path.parent))
    held, trained = (
        {(it.source, it.record.split("#")[-1]) for it in all_of(Origins(out, split, 64))}
        for split in ("validation", "train")
    )
    assert {record for _, record in held} == {"CMX.1", "CM1.1", *(["chrX"] if number == 3 else [])}
    assert not held & trained
    first, second = (f"primates/{accession.split('.')[0]}" for accession in accessions[:2])
    assert any(line.endswith(f"nothing is held out: {first}") for line in said)
    assert any("would be repeated" in line for line in said)
    far = manifest["sources"][second]["far_from_genes"]  # all of its X, on which it has no gene
    assert far == (3_000 // 64 if number < 3 else 0)


def all_of(found: Origins) -> list:
    return [found[number] for number in range(len(found))]
